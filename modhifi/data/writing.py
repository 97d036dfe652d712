"""What a model of several inputs writes itself: a decoder's tokens, an encoder's text, text behind an image."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modhifi.data.samples import Samples, digest
from modhifi.data.self_generated import draw
from modhifi.errors import ModhifiError, is_out_of_memory
from modhifi.models.loaded import LoadedModel
from modhifi.models.parts import by_kind, drawn_tokens, first_token, framed, image_token, image_tokens, special_tokens
from modhifi.progress import Progress, silent

# Items that are written side by side.
BATCH = 16
Item = Callable[[int], dict[str, Tensor]]


class Writer:
    """Writes with one model, seeded; ``remarks`` say in words what was written."""

    def __init__(self, loaded: LoadedModel, seed: int, progress: Progress = silent) -> None:
        self.loaded, self.model, self.progress = loaded, loaded.model, progress
        self.kinds = by_kind(loaded.parts)
        self.chance = torch.Generator().manual_seed(seed)
        self.remarks: list[str] = []
        self.writes = bool(self.model.can_generate())  # type: ignore[operator]

    def texts(self, n: int, pixels: Callable[[int], Tensor] | None) -> Samples:
        """`n` texts for the encoder: what the decoder writes, or the model behind an image, else tokens at random."""
        length, config = self.kinds["text"].shape[0], self.model.config
        random = [drawn_tokens(config, length, self.chance) for _ in range(n)]
        if self.writes and "decoder" in self.kinds:
            tokens = self._from_decoder(random, length)
            what = "texts written by the decoder on random tokens" if self.writes else "texts of random tokens"
        elif self.writes and pixels is not None and image_token(config) is not None:
            tokens, what = self._behind_images(pixels, n, length)
        else:
            tokens, what = random, "texts of random tokens"
        return Samples(
            load=lambda i: tokens[i],
            hashes=tuple(map(digest, tokens)),
            labels=None,
            names=tuple(f"self {i}" for i in range(n)),
            description=f"{n} {what}",
            synthetic=True,
        )

    def decoders(self, item: Item, n: int, targets: Samples | None) -> Tensor:
        """The decoder's tokens of `n` items, int64 ``(n, length)``: from the targets on, if there are any."""
        begins = [torch.zeros(0, dtype=torch.int64) if targets is None else targets.load(i) for i in range(n)]
        written = self._write(item, begins, self.kinds["decoder"].shape[0])
        how = "the decoder goes on from what the encoder reads" if self.writes else "the decoder reads random tokens"
        self.remarks.append(how if targets is None else f"targets, then {how}")
        return written

    def _from_decoder(self, random: list[Tensor], length: int) -> list[Tensor]:
        """Encoder texts, each of as many pieces as fill ``length``, that the decoder writes on random ones."""
        piece = self.kinds["decoder"].shape[0]
        count = math.ceil(length / (piece - 1))

        def item(index: int) -> dict[str, Tensor]:
            ids = random[index % len(random)]
            return framed(self.model, ids, 0, length)

        nothing = [torch.zeros(0, dtype=torch.int64)] * (count * len(random))
        rows = self._write(item, nothing, piece)[:, 1:]
        return list(rows.reshape(len(random), -1)[:, :length])

    def _write(self, item: Item, begins: list[Tensor], length: int) -> Tensor:
        """Rows of the decoder's tokens, int64 ``(n, length)``; at random where the model does not go on by itself."""
        if self.writes:
            try:
                return self._rows(item, begins, length)
            except ModhifiError:
                raise
            except Exception as error:  # a transducer, whose encoder's outputs alone are not what its forward takes
                if is_out_of_memory(error):
                    raise
                self.writes = False
        return self._rows(item, begins, length)

    @torch.inference_mode()
    def _rows(self, item: Item, begins: list[Tensor], length: int) -> Tensor:
        rows = []
        for start in range(0, len(begins), BATCH):
            self.progress("writing", start, len(begins))
            some = begins[start : start + BATCH]
            if self.writes:
                items = [item(start + i) for i in range(len(some))]
                rows.append(self._go_on({k: torch.stack([one[k] for one in items]) for k in items[0]}, some, length))
            else:
                drawn = [drawn_tokens(self.model.config, length - 1, self.chance, decoder=True) for _ in some]
                goes_on = [torch.cat([begin, more])[: length - 1] for begin, more in zip(some, drawn, strict=True)]
                first = torch.full((len(some), 1), first_token(self.model))
                rows.append(torch.cat([first, torch.stack(goes_on)], 1))
        self.progress("writing", len(begins), len(begins))
        return torch.cat(rows)

    def _go_on(self, inputs: dict[str, Tensor], begins: list[Tensor], length: int) -> Tensor:
        """Tokens that start with each of ``begins`` and go on from what the encoder reads, int64 ``(n, length)``."""
        model: Any = self.model
        parameter = next(model.parameters())
        ready = {
            k: v.to(parameter.device, parameter.dtype if v.is_floating_point() else None) for k, v in inputs.items()
        }
        takes = {k: v for k, v in ready.items() if k in ("attention_mask",)}
        states = model.get_encoder()(**ready)
        tokens = torch.full((len(begins), 1), first_token(model))
        never = [token for token in special_tokens(model.config) if token is not None]
        for at in range(length - 1):
            out = model(encoder_outputs=states, decoder_input_ids=tokens.to(parameter.device), use_cache=False, **takes)
            logits = out.logits[:, -1].float()
            logits[:, [token for token in never if token < logits.shape[1]]] = -math.inf
            drawn = draw(logits, self.chance)
            for row, begin in enumerate(begins):
                if at < len(begin):
                    drawn[row] = begin[at]
            tokens = torch.cat([tokens, drawn], 1)
        return tokens

    def _behind_images(self, pixels: Callable[[int], Tensor], n: int, length: int) -> tuple[list[Tensor], str]:
        """Texts that the model writes behind each image by its library's own generation; random where that fails."""
        model: Any = self.model
        config, shape = model.config, self.kinds["image"].shape
        parameter = next(model.parameters())
        token = image_token(config)
        assert token is not None
        texts = []
        front = image_tokens(model, torch.randn(1, *shape))
        try:
            for index in range(n):
                self.progress("writing", index, n)
                with torch.inference_mode(), torch.random.fork_rng(devices=[]):
                    torch.manual_seed(int(torch.randint(2**31, (1,), generator=self.chance)))
                    begin = drawn_tokens(config, 1, self.chance)
                    ids = torch.cat([torch.full((front,), token), begin])[None].to(parameter.device)
                    written = model.generate(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        pixel_values=pixels(index).reshape(1, *shape).to(parameter.device, parameter.dtype),
                        max_new_tokens=length - front - 1,
                        min_new_tokens=length - front - 1,
                        do_sample=True,
                        suppress_tokens=[
                            t for t in special_tokens(config) if t < model.get_input_embeddings().num_embeddings
                        ],
                    )
                texts.append(torch.cat([begin, written[0, ids.shape[1] :].cpu()])[: length - front])
        except ModhifiError:
            raise
        except Exception:  # its library's generation may raise anything; a pass of the model itself does not need it
            return [drawn_tokens(config, length - front, self.chance) for _ in range(n)], "texts of random tokens"
        return texts, "texts written by the model behind its images"
