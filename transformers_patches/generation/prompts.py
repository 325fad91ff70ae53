"""From a user's text to the token ids of a prompt: task templates, few-shot examples, chat templates."""

from __future__ import annotations

import json
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from transformers_patches.files import shipped
from transformers_patches.generation.chat_template import apply_chat_template

PROMPTS = shipped("prompts")


@dataclass(frozen=True)
class TaskTemplate:
    """How a task is put to a model."""

    stem: str  # name of the file with its few-shot examples
    question: str  # for base models, in the original's format: what comes before the answer
    answer: str  # for base models: what the answer follows
    instruction: str  # for models with a chat template
    stop: str  # where a base model would begin the next example


TEMPLATES = {
    "QA": TaskTemplate("qa", "Question: {text}\n", "Answer:", "{text}", "\nQuestion:"),
    "Summarize": TaskTemplate(
        "summarize",
        "Summarize the following document:\n{text}\n",
        "Summary:",
        "Summarize the following document:\n{text}",
        "\nSummarize the following",
    ),
    "translate_de_en": TaskTemplate(
        "translate_de_en",
        "German phrase: {text}\n",
        "English phrase:",
        "Translate from German to English. Answer with the translation only.\n{text}",
        "\nGerman phrase:",
    ),
}
FEWSHOT_OF_BASE_MODELS = 3


def predefined_prompts(task_type: str) -> list[str]:
    """The project's own prompts of a task type."""
    return json.loads((PROMPTS / "predefined_prompts.json").read_text(encoding="utf-8"))[task_type]


def few_shot_examples(task_type: str, count: int) -> list[dict[str, str]]:
    """The first `count` examples of a task type, each with `input` and `output`.

    Raises ValueError if there are fewer.
    """
    path = PROMPTS / "few_shot" / f"{TEMPLATES[task_type].stem}.json"
    examples = json.loads(path.read_text(encoding="utf-8"))
    if not 0 <= count <= len(examples):
        raise ValueError(f"num_fewshot must be 0 to {len(examples)} for {task_type}, got {count}")
    return examples[:count]


def few_shot_prompt(task_type: str, text: str, count: int) -> str:
    """A base model's prompt: `count` worked examples, then the text, ending where the answer begins."""
    template = TEMPLATES[task_type]
    worked = [
        template.question.format(text=example["input"]) + f"{template.answer} {example['output']}\n\n"
        for example in few_shot_examples(task_type, count)
    ]
    return "".join(worked) + template.question.format(text=text) + template.answer


def chat_messages(task_type: str, text: str, count: int, system_prompt: str | None) -> list[dict[str, str]]:
    """An instruction-tuned model's messages: system prompt, worked examples as earlier turns, the text."""
    template = TEMPLATES[task_type]
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    for example in few_shot_examples(task_type, count):
        messages.append({"role": "user", "content": template.instruction.format(text=example["input"])})
        messages.append({"role": "assistant", "content": example["output"]})
    return [*messages, {"role": "user", "content": template.instruction.format(text=text)}]


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation, ending where the assistant's answer begins; PartInferError if its template fails."""
    text = apply_chat_template(tokenizer, messages)
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # templates write their own special tokens


def uses_chat_template(tokenizer: PreTrainedTokenizerBase, no_chat_template: bool) -> bool:
    return tokenizer.chat_template is not None and not no_chat_template


def task_prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    task_type: str,
    text: str,
    num_fewshot: int | None,
    system_prompt: str | None = None,
    no_chat_template: bool = False,
) -> list[int]:
    """Token ids of one prompt of a task: the chat template if the tokenizer has one, else the few-shot format.

    num_fewshot: None is 0 for models with a chat template and FEWSHOT_OF_BASE_MODELS for others.
    """
    if uses_chat_template(tokenizer, no_chat_template):
        return chat_ids(tokenizer, chat_messages(task_type, text, num_fewshot or 0, system_prompt))
    count = FEWSHOT_OF_BASE_MODELS if num_fewshot is None else num_fewshot
    prompt = few_shot_prompt(task_type, text, count)
    return tokenizer(f"{system_prompt}\n\n{prompt}" if system_prompt else prompt)["input_ids"]
