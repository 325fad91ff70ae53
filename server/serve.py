"""`partinfer.py --function serve`: load a model, and answer requests until Ctrl-C."""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import signal
import socket
import sys
from pathlib import Path

import transformers
import uvicorn

from server.answering import Answering
from server.app import Service
from transformers_patches import cli
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.generation.generate import GenerationOptions
from transformers_patches.load.loader import load_model
from transformers_patches.load.other_settings import OtherSettings
from transformers_patches.plan.resolve import RunFiles
from transformers_patches.weights.lookup import model_names
from transformers_patches.weights.model_files import load_tokenizer, open_weights
from transformers_patches.weights.pack import Pack

HOST, PORT = "127.0.0.1", 8080
MOST_NEW_TOKENS = 1024  # of an answer whose request does not say; up to what the context has room for
GRACE = 5  # seconds in which open connections may end


def serve(folder: Path, settings: PartInferConfig, options: GenerationOptions, arguments: argparse.Namespace) -> int:
    """Serve a model; returns the exit code, 130 after Ctrl-C.

    options: what requests leave open. Raises PartInferError for a model that can't be loaded, and an address that
    can't be used.
    """
    opened = open_socket(arguments.host or HOST, PORT if arguments.port is None else arguments.port)
    with opened:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        answering, names = make_answering(folder, settings, options, arguments)
        service = Service(answering, names, api_key=arguments.api_key, local=_is_local(opened, arguments))
        address = _address(opened)
        if not arguments.quiet:
            print(f"serving {service.names[0]} at {address} (Ctrl-C ends)", file=sys.stderr, flush=True)
        return _run(service, opened)


def make_answering(
    folder: Path, settings: PartInferConfig, options: GenerationOptions, arguments: argparse.Namespace
) -> tuple[Answering, list[str]]:
    """The model, loaded, and the names that requests may call it by."""
    tokenizer = load_tokenizer(folder)
    files = _files(folder, settings)
    loaded = load_model(folder, settings, files.dataset_neurons, files.model_neurons)
    if arguments.num_tokens_to_generate is None:
        options = dataclasses.replace(options, max_new_tokens=MOST_NEW_TOKENS)
    answering = Answering(
        loaded,
        tokenizer,
        OtherSettings(loaded, files),
        options,
        system_prompt=arguments.system_prompt,
        chats=not arguments.no_chat_template,
    )
    names = [*model_names(folder), *([arguments.model_name] if arguments.checkpoint_path is None else [])]
    return answering, list(dict.fromkeys(names))


def _files(folder: Path, settings: PartInferConfig) -> RunFiles:
    """The neuron files that the model is loaded with, a pack's own among them."""
    files = RunFiles.of(settings)
    if not files.neurons and isinstance(weights := open_weights(folder), Pack):
        return RunFiles.of(settings, **weights.neuron_files())
    return files


def open_socket(host: str, port: int) -> socket.socket:
    """A socket at an address; PartInferError if it can't be had."""
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.socket(kind, socket.SOCK_STREAM)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
            made.listen(1024)
        except OSError:
            made.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PartInferError(
            f"host {host}, port {port} can't be used ({reason}): give another --host or --port"
        ) from None
    return made


def _address(opened: socket.socket) -> str:
    host, port = opened.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_local(opened: socket.socket, arguments: argparse.Namespace) -> bool:
    """Whether only this machine can reach the server, and needs no key for it."""
    return arguments.api_key is None and ipaddress.ip_address(opened.getsockname()[0]).is_loopback


class _Server(uvicorn.Server):
    """Ends all answers as soon as it is told to stop: uvicorn would wait for them."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame) -> None:
        self.service.close()
        super().handle_exit(sig, frame)


def _run(service: Service, opened: socket.socket) -> int:
    config = uvicorn.Config(
        service.asgi,
        log_level="critical",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE,
        lifespan="off",
        ws="none",
    )
    before = signal.signal(signal.SIGTERM, _terminated)  # uvicorn raises the signal again when it has ended
    try:
        _Server(config, service).run(sockets=[opened])
    except KeyboardInterrupt:
        return cli.INTERRUPTED
    except _Terminated:
        return cli.DONE
    finally:
        signal.signal(signal.SIGTERM, before)
        service.close()
        service.engine.join(GRACE)
    return cli.DONE


class _Terminated(Exception):
    """SIGTERM came."""


def _terminated(_signal, _frame) -> None:
    raise _Terminated
