"""lmms-eval's chat model on the compressed cache; imported by lmms-eval only (lmms_eval.py).

Prompts are the task's own messages through the processor's chat template, batches are padded on the left, decoding is what the task asks
for. `dense=True` answers with the stock cache through the same code, which is what a compressed score is to be compared with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages

from .api import load_base
from .batches import begun, end_ids
from .errors import UsageError
from .hub import open_artifact
from .runtime.enable import enable

MAX_NEW_TOKENS = 1024  # where a task names no limit
PASSED_ON = ("temperature", "top_p", "top_k", "num_beams", "repetition_penalty", "length_penalty")


class RotateK(lmms):
    """A model that decodes from an artifact's compressed cache.

    Args:
        artifact: directory, or Hub id `org/name` (`org/name@revision`); `pretrained` is another word for it.
        model: base weights other than the recorded ones.
        revision: branch, tag or commit of an artifact on the Hub.
        dtype, device, backend, fallback: as of `rotatek_compile.load`.
        batch_size: documents answered at once.
        system_prompt: put before every conversation.
        dense: use the stock cache.

    Raises:
        UsageError: no artifact, or an argument that is not known.
        RotateKError: see `rotatek_compile.load`.
    """

    is_simple = False

    def __init__(
        self,
        artifact: str | None = None,
        pretrained: str | None = None,
        model: str | None = None,
        revision: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        backend: str = "auto",
        fallback: bool = True,
        batch_size: int | str = 1,
        system_prompt: str | None = None,
        dense: bool = False,
        **unknown: Any,
    ) -> None:
        name = artifact or pretrained
        # before the base class, which names its cache of responses by it
        self.model_name = f"rotatek:{name}@{revision}:{model}:{'dense' if dense else backend}:{fallback}:{dtype}"
        super().__init__()
        # lmms-eval itself adds arguments for all models; those without a value ask for nothing
        if given := sorted(name for name, value in unknown.items() if value is not None and name != "max_batch_size"):
            raise UsageError(f"unknown model argument {', '.join(given)}; known are artifact, model, revision, dtype, device, backend, ...")
        if name is None:
            raise UsageError("--model rotatek needs an artifact: --model_args artifact=DIRECTORY or artifact=ORG/NAME")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UsageError(f"batch_size {batch_size} is not supported; it must be a whole number of at least 1")
        from accelerate import Accelerator

        # lmms-eval gathers results through these three names when several processes run
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1 and torch.cuda.is_available():
            device = f"cuda:{self.accelerator.local_process_index}"
        self.artifact = open_artifact(name, revision)
        self._model, self.processor = load_base(self.artifact, model=model, dtype=dtype, device=device)
        self.batch_size, self.system_prompt, self.dense = int(batch_size), system_prompt, dense
        if not dense:
            enable(self._model, self.artifact, backend=backend, fallback=fallback)

    @property
    def model(self) -> Any:
        """The transformers model, the compressed cache enabled on it."""
        return self._model

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        found: torch.device = self._model.device
        return found

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answers in the order of the requests, each cut before the first stop string of its task.

        Args:
            requests: `Instance` whose `args` are (context, doc_to_messages, generation arguments, document id, task, split).
        """
        answers: list[Any] = [None] * len(requests)
        for places in self._batches(requests):
            batch = [requests[place].args for place in places]
            conversations = [self._messages(*args) for args in batch]
            for place, answer in zip(places, self._answer(conversations, batch[0][2]), strict=True):
                answers[place] = answer
                context, options = requests[place].args[0], requests[place].args[2]
                self.cache_hook.add_partial("generate_until", (context, options), answer.text)
        return answers

    def _batches(self, requests: Sequence[Any]) -> Iterator[list[int]]:
        """Places of requests that are answered at once: of equal generation arguments, at most `batch_size`."""
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[2], sort_keys=True, default=str), []).append(place)
        for places in groups.values():
            yield from (places[start : start + self.batch_size] for start in range(0, len(places), self.batch_size))

    def _messages(self, context: str, doc_to_messages: Any, options: Any, doc_id: Any, task: str, split: str) -> Any:
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        if self.system_prompt:
            system = {"role": "system", "content": [{"type": "text", "text": self.system_prompt}]}
            messages = [system, *(m for m in messages if m["role"] != "system")]
        return ChatMessages(messages=messages)

    def _answer(self, conversations: Sequence[Any], options: dict[str, Any]) -> list[Any]:
        media = [conversation.extract_media() for conversation in conversations]
        images, videos, audios = ([list(found[kind]) for found in media] for kind in range(3))  # some processors want them by prompt
        if any(audios):
            raise UsageError("the task has sounds, which this model cannot hear; choose a task of images, videos or text")
        texts = [
            self.processor.apply_chat_template(conversation.to_hf_messages(), tokenize=False, add_generation_prompt=True)
            for conversation in conversations
        ]
        given = {name: items for name, items in (("images", images), ("videos", sum(videos, []))) if any(items)}
        given |= begun(self.processor, texts[0])
        inputs = self.processor(text=texts, padding=True, padding_side="left", return_tensors="pt", **given).to(self.device)
        for name, tensor in inputs.items():
            if tensor.is_floating_point():
                inputs[name] = tensor.to(self._model.dtype)
        sequences = self._model.generate(**inputs, **self._arguments(options))
        return [self._result(row, options) for row in sequences[:, inputs["input_ids"].shape[1] :]]

    def _arguments(self, options: dict[str, Any]) -> dict[str, Any]:
        """The task's generation arguments in the words of transformers; greedy unless a temperature is asked for."""
        sampled = bool(options.get("do_sample", True)) and float(options.get("temperature") or 0) > 0
        chosen = {name: options[name] for name in PASSED_ON if options.get(name) is not None}
        if not sampled:
            chosen |= {"temperature": None, "top_p": None, "top_k": None}
        limit = options.get("max_new_tokens") or MAX_NEW_TOKENS
        return chosen | {"do_sample": sampled, "max_new_tokens": int(limit), "pad_token_id": self._pad_id()}

    def _pad_id(self) -> int | None:
        found: int | None = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if found is None else found

    def _result(self, ids: torch.Tensor, options: dict[str, Any]) -> Any:
        ends = {*end_ids(self._model), self._pad_id()}
        tokens = next((n for n, token in enumerate(ids.tolist()) if token in ends), len(ids))
        text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        until = options.get("until") or ()
        for stop in (until,) if isinstance(until, str) else until:
            if stop:
                text = text.split(stop)[0].rstrip()
        return GenerationResult(text=text, token_counts=TokenCounts(output_tokens=tokens))

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not there: scoring given answers reads no compressed cache.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("rotatek answers generate_until tasks only; choose the generative variant of this task")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        """Not there yet.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("rotatek answers single-round tasks only; choose the single-round variant of this task")
