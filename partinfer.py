#!/usr/bin/env python3
"""Run a model with a part of its FFN neurons: answer a prompt, chat, or run the predefined prompts."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from contextlib import suppress
from pathlib import Path

from transformers_patches import VERSION, cli, flags, quick_start
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.generation.options import generation_options
from transformers_patches.neurons.lookup import TASK_TYPES
from transformers_patches.plan.first_checks import check_files

FUNCTIONS = ("normal", "chat", "predefined_prompts", "compare", "pack", "export", "plan", "serve")
WRITERS = ("pack", "export")  # they write --output
SERVER_FLAGS = ("host", "port", "api_key")


EXAMPLES = """\
examples, one for each --function (without any option: the demo model answers a question)
  normal              %(prog)s --prompt "Why is the sky blue?"
  chat                %(prog)s --function chat --system_prompt "Answer briefly."
  predefined_prompts  %(prog)s --function predefined_prompts --task_type translate_de_en
  compare             %(prog)s --function compare --max_loss 0.1 --prompt "Why is the sky blue?"
  pack                %(prog)s --function pack --dtype int4 --output models/demo-int4
  export              %(prog)s --function export --output models/demo.gguf
  plan                %(prog)s --function plan --memory 400M
  serve               %(prog)s --function serve --port 8080
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, usage="%(prog)s [--function NAME] [options]", formatter_class=flags.Help
    )
    parser.add_argument("--version", action="version", version=f"PartInfer {VERSION}")
    flags.add_config(parser)
    flags.add_completion(parser)
    _add_task(parser.add_argument_group("what to do"))
    flags.add_computing(flags.add_model(parser))
    _add_generation(parser.add_argument_group("how it answers"))
    PartInferConfig.add_arguments(parser)
    server = parser.add_argument_group("the server, --function serve")
    server.add_argument("--host", help="address to listen at; 0.0.0.0: every one of this machine (127.0.0.1)")
    server.add_argument("--port", type=int, help="0: any free one (8080)")
    server.add_argument("--api_key", metavar="KEY", help="what clients must send (nothing)")
    out = parser.add_argument_group("what is printed and written")
    flags.add_json(out)
    flags.add_quiet(out)
    out.add_argument("--verbose", action="store_true", help="after each answer: what was read in each layer")
    out.add_argument("--mask_filepath", metavar="FILE", help="write the load plan that was used, as JSON")
    return parser


def _add_task(task: argparse._ArgumentGroup) -> None:
    task.add_argument(
        "--function",
        choices=FUNCTIONS,
        default="normal",
        help="answer one prompt, chat, or answer the project's own prompts; compare with dense; write a pack; export "
        "for transformers or llama.cpp; show what --memory has room for (plan); serve OpenAI's API and a chat page (normal)",
    )
    task.add_argument("--prompt", help="the text; - reads standard input (a predefined prompt)")
    task.add_argument("--task_type", choices=TASK_TYPES, default="QA", help="kind of the prompts (QA)")
    task.add_argument("--system_prompt", help="what the model is told first")
    task.add_argument("--num_fewshot", type=int, help="worked examples before the prompt (0; 3 for base models)")
    task.add_argument("--no_chat_template", action="store_true", help="treat the model as a base model")
    task.add_argument(
        "--output",
        metavar="PATH",
        help="the planned neurons: a folder to load them faster (pack); a folder that transformers loads, or a file that "
        "llama.cpp loads if the name ends in .gguf (export)",
    )
    text = "where --memory or --on_demand needs a pack of all neurons: write one beside the model, once (int4, if no --dtype is given)"
    task.add_argument("--make_pack", action="store_true", help=text)
    text = "with --function pack: values that python -m profiler round has chosen, closer to the model's own output"
    task.add_argument("--rounding", metavar="FILE", help=text)


def _add_generation(choice: argparse._ArgumentGroup) -> None:
    choice.add_argument("--num_tokens_to_generate", type=int, help="at most (128; 1024 with --function serve)")
    choice.add_argument("--sampling-method", "--sampling_method", choices=("greedy", "top-p"), default="greedy")
    choice.add_argument("--temperature", type=float, default=1.0, help="of top-p sampling (1.0)")
    choice.add_argument("--top_p", type=float, default=0.9, help="of top-p sampling (0.9)")
    choice.add_argument("--top_k", type=int, default=0, help="of top-p sampling, 0: no limit (0)")
    choice.add_argument(
        "--stop",
        action="append",
        default=[],
        help="end at this text; may be given several times (--stop=--- if it begins with a -)",
    )
    choice.add_argument("--seed", type=int, default=0, help="of sampling (0)")


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    arguments = flags.parse(parser, argv)
    try:
        PartInferConfig.from_arguments(arguments)
        _check_output(arguments)
        _check_server(arguments)
        options = generation_options(arguments)
    except PartInferError as error:
        parser.error(str(error))
    given = PartInferConfig.given_in(arguments)
    folder = check_files(arguments.model_name, arguments.checkpoint_path, given, arguments.task_type)
    cli.begin(arguments)
    # heavy imports only now: --help, and whatever can be known to be wrong by then, answer at once
    quick_start.import_ahead()
    from transformers_patches.generation.runner import Runner

    quick_start.imported()
    if arguments.make_pack:
        folder = _own_pack(folder, arguments)
    settings = _settings_with_files(folder, arguments)
    if arguments.function in WRITERS:
        return (_pack if arguments.function == "pack" else _export)(settings, folder, arguments)
    if arguments.function == "plan":
        return _plan(settings, folder, arguments)
    if arguments.function == "serve":
        from server.serve import serve

        return serve(folder, settings, options, arguments)
    runner = Runner(folder, settings, options, arguments)
    if arguments.mask_filepath:
        runner.loaded.plan.save(arguments.mask_filepath)
    try:
        code = getattr(runner, arguments.function)()
    except BaseException:
        if arguments.json and runner.results:  # what was answered before
            with suppress(OSError):
                cli.write_json(arguments.json, runner.report())
        raise
    if arguments.json:
        cli.write_json(arguments.json, runner.report())
    return code


def _check_output(arguments: argparse.Namespace) -> None:
    if arguments.function in WRITERS and not arguments.output:
        raise PartInferError(f"--function {arguments.function} writes a folder: name it with --output FOLDER")
    if arguments.make_pack and arguments.function in WRITERS:
        raise PartInferError(f"--make_pack is for runs, got --function {arguments.function}: leave it out")
    if arguments.rounding and arguments.function != "pack":
        raise PartInferError(f"--rounding belongs to --function pack, got --function {arguments.function}")
    if arguments.output and arguments.function not in WRITERS:
        raise PartInferError(f"--output belongs to --function pack or export, got --function {arguments.function}")


def _check_server(arguments: argparse.Namespace) -> None:
    """Flags of the server belong to it, and it needs packages of its own."""
    given = next((name for name in SERVER_FLAGS if getattr(arguments, name) is not None), None)
    if arguments.function != "serve":
        if given is not None:
            raise PartInferError(f"--{given} belongs to --function serve, got --function {arguments.function}")
        return
    if arguments.port is not None and not 0 <= arguments.port <= 65535:
        raise PartInferError(f"port must be 0 to 65535, got {arguments.port}")
    if arguments.api_key == "":
        raise PartInferError("api_key must be a text, got an empty one: leave it out for no key")
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if importlib.util.find_spec(name) is None]
    if missing:
        raise PartInferError(
            f"--function serve needs {', '.join(missing)}: pip install -r requirements-serve.txt (or 'partinfer[serve]')"
        )


def _pack(settings: PartInferConfig, folder: Path, arguments: argparse.Namespace) -> int:
    """Write the planned neurons to a folder of their own, and say how big it is."""
    from transformers_patches.load.pack_writer import write_pack

    made = write_pack(folder, arguments.output, settings, rounding=arguments.rounding)
    if arguments.json:
        sizes = {name: made[name] for name in ("settings", "dtype", "bytes", "bytes_dense")}
        cli.write_json(arguments.json, {"output": arguments.output, **sizes})
    if arguments.json != flags.STANDARD_OUTPUT and not arguments.quiet:
        print(f"{arguments.output}: {made['bytes'] / 1e6:.0f} of {made['bytes_dense'] / 1e6:.0f} MB", file=sys.stderr)
    return cli.DONE


def _own_pack(folder: Path, arguments: argparse.Namespace) -> Path:
    """The model's own pack, if there is something to read on demand."""
    from transformers_patches.load.own_pack import own_pack
    from transformers_patches.weights.file_kinds import is_pack

    if is_pack(folder):
        return folder
    given = PartInferConfig.given_in(arguments)
    return own_pack(folder, given, task_type=arguments.task_type, quiet=arguments.quiet)


def _export(settings: PartInferConfig, folder: Path, arguments: argparse.Namespace) -> int:
    """Write the planned neurons as a plain model, and say what is in it."""
    from transformers_patches.load.export import write_export

    made = write_export(folder, arguments.output, settings)
    plan = made.plan
    same = {
        "loaded_neurons_percent": plan.settings.loaded_neurons_percent,
        "start_num": plan.settings.start_num,
        "end_num": plan.settings.end_num,
        "compensation": plan.settings.compensation,
    }
    if arguments.json:
        sizes = {"neurons": plan.size, "bytes": made.bytes, "bytes_dense": made.bytes_dense, "notes": list(plan.notes)}
        cli.write_json(arguments.json, {"output": arguments.output, "settings": same, **sizes})
    if arguments.json != flags.STANDARD_OUTPUT and not arguments.quiet:
        for note in plan.notes:
            print(note, file=sys.stderr)
        equal = " ".join(f"--{name} {value}" for name, value in same.items())
        sizes = f"{plan.size} neurons in each layer, {made.bytes / 1e6:.0f} of {made.bytes_dense / 1e6:.0f} MB"
        print(f"{arguments.output}: {sizes}; the same as --method dense --use_partial_loading {equal}", file=sys.stderr)
    return cli.DONE


def _plan(settings: PartInferConfig, folder: Path, arguments: argparse.Namespace) -> int:
    """Print what could be run within --memory, and what would be."""
    from transformers_patches.load.plan_table import as_json, as_text, plan_rows

    rows = plan_rows(folder, settings)
    if arguments.json:
        cli.write_json(arguments.json, as_json(rows))
    if arguments.json != flags.STANDARD_OUTPUT:
        print(as_text(rows))
    return cli.DONE


def _settings_with_files(folder: Path, arguments: argparse.Namespace) -> PartInferConfig:
    """The settings for a model, with the neuron files that are looked up, and says which; a pack's own where it is one."""
    from transformers_patches.plan.neuron_files import settings_for, why_dense
    from transformers_patches.weights.file_kinds import is_pack
    from transformers_patches.weights.lookup import model_name

    given = PartInferConfig.given_in(arguments)
    settings = settings_for(folder, given, arguments.task_type)
    paths = (settings.dataset_neurons_filepath, settings.model_neurons_filepath)
    if any(paths) and not {"dataset_neurons_filepath", "model_neurons_filepath"} & given.keys() and not arguments.quiet:
        named = ", ".join(Path(path).name for path in paths if path)
        print(f"neuron files: {named} for {model_name(folder)}", file=sys.stderr)
    if settings.method == "dense" and "method" not in given and not arguments.quiet:
        print(
            f"{model_name(folder)} can't be computed by neurons, and runs dense: {why_dense(folder)}", file=sys.stderr
        )
    if settings.use_partial_loading and not any(paths) and not is_pack(folder) and not arguments.quiet:
        print(
            f"no neuron files for {model_name(folder)}: everything is loaded, and a token reads {settings.sparsity:.0%} of "
            "the FFN bytes; python -m profiler run measures what that costs",
            file=sys.stderr,
        )
    return settings


def run() -> None:
    """The installed command."""
    quick_start.begin()
    cli.run(main)


if __name__ == "__main__":
    run()
