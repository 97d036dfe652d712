"""Loading: formats, refusals, preprocessing, and real downloads from a local server that speaks the hub's protocol."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from hub_server import TOKEN, HubServer, Repository
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor, nn

import modhifi
from modhifi.errors import ModhifiError
from modhifi.models.from_transformers import _without_quantiser
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel, main_output
from modhifi.models.parts import require_parts
from modhifi.models.preprocess import to_mode

ROOT = Path(__file__).parents[2]
NARROW = {"channels": (8, 8, 8, 8)}
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = SMALL | {"vocab_size": 50}
VIT = SMALL | {"image_size": 32, "patch_size": 8}


def save_timm(directory: Path, half: bool = False) -> nn.Module:
    torch.manual_seed(1)
    model = timm.create_model("resnet18", num_classes=3, **NARROW).eval()
    model.pretrained_cfg.update(
        input_size=(3, 32, 32),
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.2, 0.2),
        crop_pct=1.0,
        num_classes=3,
        label_names=["cat", "dog", "owl"],
        license="mit",
    )
    save_for_hf(model.half() if half else model, directory, model_args=NARROW, safe_serialization=True)
    return model.float()


def save_llama(directory: Path, **more: object) -> nn.Module:
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TOKENS, num_key_value_heads=2, **more)).eval()
    model.save_pretrained(directory)
    return model


def load(*args: object, **options: object) -> LoadedModel:
    """Load and assert what every loaded model promises."""
    loaded = load_model(*args, **options)  # type: ignore[arg-type]
    assert not loaded.model.training
    assert not any(p.requires_grad or p.device.type != "cpu" for p in loaded.model.parameters())
    assert len(loaded.example) == len(loaded.logits(loaded.example)) == 2
    json.dumps(loaded.info, allow_nan=False)
    return loaded


def refusal(*args: object, **options: object) -> str:
    with pytest.raises(ModhifiError) as caught:
        load_model(*args, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("half", [False, True])
def test_timm_directory(tmp_path: Path, half: bool) -> None:
    model = save_timm(tmp_path, half)
    loaded = load(tmp_path)
    assert (loaded.framework, loaded.kind, loaded.source) == ("timm", "image", str(tmp_path))
    assert loaded.example.shape == (2, 3, 32, 32) and loaded.labels == ("cat", "dog", "owl")
    assert all(p.dtype == torch.float32 for p in loaded.model.parameters())
    assert torch.equal(loaded.logits(loaded.example), model(loaded.example))
    assert loaded.info["architecture"] == "resnet18" and loaded.info["licence"] == "mit"
    again = timm.create_model(loaded.info["architecture"], **loaded.info["model_args"])
    again.load_state_dict(loaded.model.state_dict())


def test_timm_transform_is_the_models_own(tmp_path: Path) -> None:
    save_timm(tmp_path)
    transform = load(tmp_path).transform
    assert transform is not None
    flat = transform(Image.new("RGB", (50, 40), (255, 0, 51)))
    expected = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor([0.4, 0.5, 0.6])) / 0.2
    assert flat.shape == (3, 32, 32) and torch.allclose(flat, expected.view(3, 1, 1).expand(3, 32, 32), atol=1e-6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr"])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_image_mode_becomes_the_models_channels(mode: str, channels: int) -> None:
    loaded = load("timm:resnet18", pretrained=False, model_args=NARROW | {"in_chans": channels, "num_classes": 2})
    assert loaded.transform is not None
    pixels = loaded.transform(Image.new(mode, (300, 260)))
    assert pixels.dtype == torch.float32 and pixels.shape == (channels, 224, 224)
    assert torch.isfinite(pixels).all()


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    image = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    assert np.asarray(to_mode(image, "L")).tolist() == [[0, 100, 255]]


def test_random_weights_are_the_same_each_time() -> None:
    state = torch.random.get_rng_state()
    one, two = (load("timm:resnet18", pretrained=False, model_args=NARROW | {"num_classes": 2}) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))
    assert torch.equal(one.example, two.example) and torch.equal(state, torch.random.get_rng_state())
    assert one.info["licence"] is None and "random weights, seed 0" in one.info["notes"]


def test_imagenet_labels_belong_to_a_thousand_classes() -> None:
    loaded = load("timm:resnet18", pretrained=False, model_args=NARROW)
    assert loaded.labels is not None and len(loaded.labels) == 1000 and loaded.labels[0].startswith("tench")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weight_file(tmp_path: Path, suffix: str) -> None:
    model = save_timm(tmp_path)
    file = tmp_path / f"model{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": model.state_dict()}, file)
    loaded = load("timm:resnet18", weights=file, model_args=NARROW | {"num_classes": 3})
    assert torch.equal(loaded.model.fc.weight, model.fc.weight)
    other = NARROW | {"num_classes": 4}
    message = refusal("timm:resnet18", weights=file, model_args=other)
    assert "has 3 classes and resnet18 " in message and "(--model-arg num_classes=3)" in message
    wide = {"channels": (16, 24, 32, 40), "num_classes": 3}
    assert "the weights have other shapes" in refusal("timm:resnet18", weights=file, model_args=wide)


def test_pickled_code_is_refused_and_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    save_timm(tmp_path / "timm")
    save_llama(tmp_path / "llama")
    for directory in ("timm", "llama"):
        (tmp_path / directory / "model.safetensors").unlink()
        torch.save({"weight": Bomb()}, tmp_path / directory / "pytorch_model.bin")
        assert "safetensors" in refusal(tmp_path / directory)
    torch.save(save_timm(tmp_path / "whole"), tmp_path / "whole.pth")
    assert "pickle that holds code" in refusal("timm:resnet18", weights=tmp_path / "whole.pth")
    assert not (tmp_path / "ran").exists()


def test_integer_weights_in_a_file_are_refused(tmp_path: Path) -> None:
    state = save_timm(tmp_path).state_dict()
    state["fc.weight"] = state["fc.weight"].to(torch.int8)
    torch.save(state, tmp_path / "int8.pth")
    message = refusal("timm:resnet18", weights=tmp_path / "int8.pth", model_args=NARROW | {"num_classes": 3})
    assert "quantised" in message and "fc.weight" in message


def test_causal_language_model(tmp_path: Path) -> None:
    model = save_llama(tmp_path).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# card\n")
    loaded = load(tmp_path)
    assert (loaded.framework, loaded.kind, loaded.tokenizer) == ("transformers", "text", None)
    assert loaded.example.shape == (2, 16) and loaded.example.dtype == torch.int64
    assert next(loaded.model.parameters()).dtype == torch.bfloat16
    assert loaded.info["architecture"] == "LlamaForCausalLM" and loaded.info["licence"] == "apache-2.0"
    assert torch.equal(loaded.logits(loaded.example), model(loaded.example).logits)


class Codes(nn.Module):
    """Reads integer codes of which -1 stands for a missing one."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden, self.head = nn.Embedding(9, 8), nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, codes: Tensor) -> Tensor:
        return self.head(self.hidden(self.table(codes + 1)).relu().mean(1))


def test_minus_one_is_padding_in_texts_alone() -> None:
    model, codes = Codes(), torch.randint(-1, 8, (64, 5), generator=torch.Generator().manual_seed(0))
    loaded = load_model(model, example=codes[:2])
    assert int((codes == -1).sum()) > 0 and loaded.real_tokens(codes) is None
    assert torch.equal(loaded.logits(codes), model(codes))
    whole = modhifi.prune(model, codes, ratio=0.5, checks={"walked": 0})
    shifted = modhifi.prune(Shifted(model), codes + 1, ratio=0.5, checks={"walked": 0})
    assert whole.plan.kept == {n.removeprefix("codes."): kept for n, kept in shifted.plan.kept.items()}
    for a, b in zip(whole.model.parameters(), shifted.model.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ModhifiError, match="give items of one shape"):
        modhifi.prune(model, [codes[0], codes[1, :3], *codes[2:]], ratio=0.5)


class Shifted(nn.Module):
    """The same model for codes that begin at 0."""

    def __init__(self, codes: Codes) -> None:
        super().__init__()
        self.codes = codes

    def forward(self, codes: Tensor) -> Tensor:
        return self.codes(codes - 1)


def test_tokenizer_comes_with_its_files(tmp_path: Path) -> None:
    transformers.BertModel(transformers.BertConfig(**TOKENS)).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nhello\n")
    loaded = load(tmp_path)
    assert loaded.kind == "encoder" and loaded.tokenizer is not None
    assert loaded.tokenizer("hello")["input_ids"] == [2, 5, 3]
    assert loaded.logits(loaded.example).shape == (2, 16, 16)


def test_sequence_classifier_keeps_head_and_labels(tmp_path: Path) -> None:
    config = transformers.BertConfig(**TOKENS, id2label={0: "neg", 1: "pos"}, label2id={"neg": 0, "pos": 1})
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.kind == "encoder" and loaded.labels == ("neg", "pos")
    assert loaded.logits(loaded.example).shape == (2, 2)


def test_masked_language_model_keeps_its_head(tmp_path: Path) -> None:
    transformers.BertForMaskedLM(transformers.BertConfig(**TOKENS)).save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.kind == "encoder" and loaded.logits(loaded.example).shape == (2, 16, 50)


def test_image_classifier_with_and_without_processor_files(tmp_path: Path) -> None:
    transformers.ViTForImageClassification(transformers.ViTConfig(**VIT)).save_pretrained(tmp_path)
    guessed = load(tmp_path)
    assert any("preprocessor_config.json" in note for note in guessed.info["notes"])
    size = {"height": 32, "width": 32}
    processor = transformers.ViTImageProcessor(size=size, image_mean=[0.1] * 3, image_std=[0.5] * 3)
    processor.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.kind == "image" and loaded.info["notes"] == [] and loaded.labels is None
    assert loaded.transform is not None and guessed.transform is not None
    for mode in ("L", "P", "RGBA", "I;16"):
        assert loaded.transform(Image.new(mode, (40, 30))).shape == (3, 32, 32)
    white = Image.new("RGB", (40, 30), "white")
    assert torch.allclose(loaded.transform(white), torch.full((3, 32, 32), 1.8), atol=1e-5)
    assert torch.allclose(guessed.transform(white), torch.ones(3, 32, 32), atol=1e-5)


@pytest.mark.parametrize("kind", ["other names", "other family", "head alone"])
def test_weights_of_no_tensor_of_the_model_are_refused(tmp_path: Path, kind: str) -> None:
    config = transformers.BertConfig(**TOKENS)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    if kind == "head alone":
        state = {name: tensor for name, tensor in state.items() if name.startswith("cls.")}
    elif kind == "other family":
        state = transformers.ViTModel(transformers.ViTConfig(**VIT)).state_dict()
    else:
        state = {f"net.{number}": tensor.clone() for number, tensor in enumerate(state.values())}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = refusal(tmp_path)
    assert "holds no weights of its BertForMaskedLM" in message and "bert.embeddings" in message
    assert load(tmp_path, pretrained=False).kind == "encoder"


def test_a_partly_matching_checkpoint_is_noted(tmp_path: Path) -> None:
    transformers.BertModel(transformers.BertConfig(**TOKENS)).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["encoder.layer.0.output.dense.bias"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert any("newly initialised: encoder.layer.0.output.dense.bias" in n for n in load(tmp_path).info["notes"])


def test_weights_that_timm_does_not_know_are_refused(tmp_path: Path) -> None:
    state = save_timm(tmp_path).state_dict()
    save_file({f"net.{name}": tensor for name, tensor in state.items()}, tmp_path / "model.safetensors")
    assert "conv1" in refusal(tmp_path)


def test_head_left_out_is_noted(tmp_path: Path) -> None:
    transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**VIT)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["ViTOfSomebodyElse"]}))
    loaded = load(tmp_path)
    assert "loaded as ViTModel: the head of ViTOfSomebodyElse is left out" in loaded.warnings
    assert any("pooler" in note for note in loaded.info["notes"])
    assert "are not used by ViTModel, such as 'decoder.0.bias'" in " ".join(loaded.warnings)


def test_gguf_is_dequantised_and_can_be_saved(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Without a bar for every tensor where nobody looks on."""
    write_gguf(tmp_path / "tiny.gguf", model := save_llama(tmp_path / "plain"))
    capfd.readouterr()
    load(tmp_path / "tiny.gguf")
    assert "GGUF" not in capfd.readouterr().err
    for loaded in (load(tmp_path / "tiny.gguf"), load(tmp_path, gguf_file="tiny.gguf")):
        assert loaded.kind == "text" and loaded.tokenizer is not None
        assert torch.allclose(loaded.logits(loaded.example), model(loaded.example).logits, atol=1e-5)
        loaded.model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_a_gguf_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf", save_llama(tmp_path / "plain"))
    gguf, read = pytest.importorskip("gguf"), []
    build = gguf.GGUFReader.__init__
    monkeypatch.setattr(gguf.GGUFReader, "__init__", lambda *given: (read.append(given[1:]), build(*given))[1])
    before = dict(vars(gguf))
    load(tmp_path / "tiny.gguf")
    assert len(read) == 1 and dict(vars(gguf)) == before


def test_dequantising_keeps_the_embedding_and_the_head_one_tensor(tmp_path: Path) -> None:
    fresh = _without_quantiser(save_llama(tmp_path, tie_word_embeddings=True))
    assert fresh.lm_head.weight is fresh.model.embed_tokens.weight


def write_gguf(path: Path, model: nn.Module) -> None:
    """The tiny Llama as an unquantised GGUF file with a made-up vocabulary."""
    gguf = pytest.importorskip("gguf")
    config, state = model.config, {k: v.detach().numpy() for k, v in model.state_dict().items()}
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["t", "1", *(f"t{i}" for i in range(1, config.vocab_size - 1))])
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    writer.add_tensor("output.weight", state["lm_head.weight"])
    for layer in range(config.num_hidden_layers):
        for name, short in names.items():
            weight = state[f"model.layers.{layer}.{name}.weight"]
            if short in ("attn_q", "attn_k"):
                # GGUF stores the rotary halves interleaved.
                heads = config.num_attention_heads if short == "attn_q" else config.num_key_value_heads
                weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape).copy()
            writer.add_tensor(f"blk.{layer}.{short}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Odd(nn.Module):
    """Returns its output inside a tuple inside a dictionary, as detection models do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> dict[str, tuple[Tensor, int]]:
        return {"out": (self.linear(x), 0)}


def test_module_is_copied_and_needs_an_example() -> None:
    module, example = Odd(), torch.ones(2, 3)
    loaded = load(module, example=example)
    assert (loaded.framework, loaded.kind, loaded.source) == ("torch", "tensor", "module:Odd")
    assert torch.equal(loaded.example, example) and loaded.logits(example).shape == (2, 4)
    assert module.training and module.linear.weight.requires_grad
    assert loaded.logits(example, model=nn.Linear(3, 5).double()).dtype == torch.float64
    assert "example=" in refusal(module)


def test_known_modules_need_no_example(tmp_path: Path) -> None:
    assert load(timm.create_model("resnet18", **NARROW)).framework == "timm"
    assert load(save_llama(tmp_path)).kind == "text"


def test_output_without_a_tensor_is_an_error() -> None:
    for out in ((), {}, "text", [None]):
        with pytest.raises(ModhifiError, match="not a tensor"):
            main_output(out)


def test_first_tensor_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model = timm.create_model("resnet18", **NARROW)
    model.layer3[0].conv1.weight.data[0, 0, 0, 0] = float("inf")
    model.layer4[0].conv1.weight.data[0, 0, 0, 0] = float("nan")
    assert "'layer3.0.conv1.weight' holds NaN or infinite" in refusal(model)
    model = timm.create_model("resnet18", **NARROW)
    model.bn1.running_var[0] = float("nan")
    assert "'bn1.running_var'" in refusal(model)


def test_minus_infinity_in_a_buffer_is_a_mask() -> None:
    module = nn.Linear(3, 3)
    module.register_buffer("mask", torch.full((2, 2), float("-inf")))
    load(module, example=torch.ones(2, 3))


@pytest.mark.parametrize(
    "entry", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "bitsandbytes", "load_in_4bit": True}]
)
def test_quantised_checkpoint_is_refused(tmp_path: Path, entry: dict[str, object]) -> None:
    save_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": entry}))
    message = refusal(tmp_path)
    assert "already quantised" in message and "4-bit" in message and str(entry["quant_method"]) in message


@pytest.mark.parametrize(("save", "kind"), [(save_timm, torch.int8), (save_llama, torch.float8_e4m3fn)])
def test_quantised_weights_in_a_directory_are_refused(save, kind: torch.dtype, tmp_path: Path) -> None:
    save(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    name = next(name for name, value in state.items() if value.ndim > 1)
    save_file(state | {name: state[name].to(kind)}, path)
    assert "already quantised" in (message := refusal(tmp_path)) and repr(name) in message


def test_quantised_module_is_refused() -> None:
    module = nn.Sequential(nn.Linear(3, 3))
    module[0].weight = nn.Parameter(module[0].weight.to(torch.int8), requires_grad=False)
    assert "'0.weight' is torch.int8" in refusal(module, example=torch.ones(2, 3))
    eight_bit = nn.Sequential(nn.Linear(3, 3)).to(torch.float8_e4m3fn)
    assert "float8" in refusal(eight_bit, example=torch.ones(2, 3))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("timm:resnt18", "nearest: resnet18"),
        ("timm:resnet18.a1_in2k", "nearest: a1_in1k"),
        ("timm:org/name", "hf:ORG/NAME"),
        ("timm:resnet18", "HF_HUB_OFFLINE"),
        ("resnet18", "is timm:resnet18 meant?"),
        ("org/name", "is hf:org/name meant?"),
        ("/no/such/directory", "there is no directory"),
        ("/no/such/model.gguf", "there is no file"),
        ("hf:not a name", "hf:ORG/NAME"),
        ("hf:org/name@a", "HF_HUB_OFFLINE"),
    ],
)
def test_wrong_names(spec: str, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert says in refusal(spec)


def test_options_that_do_not_fit(tmp_path: Path) -> None:
    save_llama(tmp_path / "llama")
    assert "weights=FILE" in refusal(tmp_path, weights="x.pth")
    assert "hf:ORG/NAME" in refusal(tmp_path, revision="main")
    assert "language model" in refusal("timm:resnet18", gguf_file="x.gguf")
    assert "two revisions" in refusal("hf:org/name@a", revision="b")
    assert "no weight file" in refusal("timm:resnet18", weights=tmp_path / "x.pth")
    assert "is not a weight file" in refusal("timm:resnet18", weights=tmp_path)
    assert "are downloaded" in refusal("timm:resnet18", pretrained=False, revision="main")
    assert "timm's models" in refusal(tmp_path / "llama", model_args={"a": 1})
    assert "unexpected keyword argument 'foo'" in refusal("timm:resnet18", pretrained=False, model_args={"foo": 1})
    assert "already built" in refusal(nn.Linear(3, 3), model_args={"a": 1})


def test_broken_directories(tmp_path: Path) -> None:
    assert "needs a config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "is not JSON" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "not a JSON object" in refusal(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_family"}')
    assert "no_such_family" in refusal(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "no_such_net", "pretrained_cfg": {}}')
    assert "no_such_net" in refusal(tmp_path)
    save_timm(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot load" in refusal(tmp_path / "cut")


def test_weights_of_other_shapes_point_to_the_manifest_of_a_pruned_model(tmp_path: Path) -> None:
    save_llama(tmp_path / "text")
    save_timm(tmp_path / "image")
    for file in (tmp_path / kind / "model.safetensors" for kind in ("text", "image")):
        tensors = load_file(file)
        name = next(name for name, tensor in tensors.items() if tensor.ndim > 1)
        save_file(tensors | {name: tensors[name][:-1].clone()}, file, metadata={"format": "pt"})
        assert "modhifi.json" in refusal(file.parent)


def test_models_whose_input_is_not_known_say_so() -> None:
    with pytest.raises(ModhifiError, match="x reads 'codebook_idx'; only pixels, token ids, sounds, series"):
        require_parts((), "x", "codebook_idx")


def test_remote_code_runs_only_when_trusted(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "configuration_own.py").write_text(
        f"import pathlib\nfrom transformers import LlamaConfig\npathlib.Path({str(mark)!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (tmp_path / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    save_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own", "auto_map": auto_map, "architectures": ["OwnForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "trust_remote_code" in refusal(tmp_path) and not mark.exists()
    loaded = load(tmp_path, trust_remote_code=True)
    assert mark.exists() and loaded.kind == "text" and loaded.info["architecture"] == "OwnForCausalLM"


def test_modhifi_directory_goes_to_the_artefact_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_timm(tmp_path)
    expected = load(tmp_path)
    (tmp_path / "modhifi.json").write_text("{}")
    stub = types.ModuleType("modhifi.models.artifact")
    stub.load_artifact = lambda directory: expected if directory == tmp_path else None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modhifi.models.artifact", stub)
    assert load(tmp_path) is expected


# One process for all downloads: the hub's library reads HF_ENDPOINT once, when it is imported.
DOWNLOADS = """
import json, os, sys, urllib.request
import torch
from modhifi.errors import ModhifiError
from modhifi.models.load import load_model

def attempt(*args, **options):
    try:
        loaded = load_model(*args, **options)
        loaded.logits(loaded.example)
        first = next(loaded.model.parameters())
        return {"framework": loaded.framework, "kind": loaded.kind, "source": loaded.source,
                "first": first.double().sum().item(), "revision": loaded.info["revision"],
                "licence": loaded.info["licence"], "repository": loaded.info["repository"]}
    except ModhifiError as error:
        return str(error)

def stop_hub():
    while True:  # until the port is closed, and not only about to be
        try:
            urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/stop").read()
        except OSError:
            return

results = {}
for name, args, options in json.loads(sys.argv[1]):
    if name == "gated with a token":
        os.environ["HF_TOKEN"] = sys.argv[2]
    if name == "gated with a wrong token":
        os.environ["HF_TOKEN"] = "hf_wrong"
    if name == "after the network went":
        os.environ.pop("HF_TOKEN")
        stop_hub()
    results[name] = attempt(*args, **options)
print("RESULTS" + json.dumps(results))
"""

CARD = b"---\nlicense: cc-by-4.0\n---\n# card\n"


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> types.SimpleNamespace:
    root = tmp_path_factory.mktemp("hub")
    save_timm(root / "timm")
    llama = save_llama(root / "llama")
    save_llama(root / "bin")
    (root / "bin" / "model.safetensors").unlink()
    torch.save(llama.state_dict(), root / "bin" / "pytorch_model.bin")
    tiny = timm.create_model("test_resnet")
    save_for_hf(tiny, root / "registry", safe_serialization=True)
    models = {n: Repository() for n in ("org/timm", "org/llama", "org/bin", "org/gated", "org/quantised", "org/bare")}
    models |= {"timm/test_resnet.r160_in1k": Repository()}
    models["org/gated"].gated = True
    shas = {
        "timm": models["org/timm"].commit_directory(root / "timm"),
        "old": models["org/llama"].commit_directory(root / "llama", "v1", **{"README.md": CARD}),
        "bin": models["org/bin"].commit_directory(root / "bin"),
        "registry": models["timm/test_resnet.r160_in1k"].commit_directory(root / "registry"),
    }
    with torch.no_grad():
        llama.model.embed_tokens.weight.zero_()
    llama.save_pretrained(root / "llama")
    shas["new"] = models["org/llama"].commit_directory(root / "llama", **{"onnx/model.onnx": b"0" * 1000})
    models["org/gated"].commit_directory(root / "llama")
    models["org/bare"].commit({"README.md": CARD})
    config = json.loads((root / "llama" / "config.json").read_text()) | {"quantization_config": {"quant_method": "awq"}}
    models["org/quantised"].commit_directory(root / "llama", **{"config.json": json.dumps(config).encode()})
    cases = [
        ("timm repository", ["hf:org/timm"], {}),
        ("newest", ["hf:org/llama"], {}),
        ("tag", ["hf:org/llama@v1"], {}),
        ("commit", ["hf:org/llama"], {"revision": shas["old"]}),
        ("only .bin", ["hf:org/bin"], {}),
        ("registry", ["timm:test_resnet"], {}),
        ("registry pinned", ["timm:test_resnet"], {"revision": shas["registry"], "model_args": {"num_classes": 2}}),
        ("registry not there", ["timm:test_vit"], {}),
        ("unknown", ["hf:org/nobody"], {}),
        ("unknown revision", ["hf:org/llama@v9"], {}),
        ("bare", ["hf:org/bare"], {}),
        ("quantised", ["hf:org/quantised"], {}),
        ("no such gguf", ["hf:org/llama"], {"gguf_file": "x.gguf"}),
        ("gated", ["hf:org/gated"], {}),
        ("gated with a wrong token", ["hf:org/gated"], {}),
        ("gated with a token", ["hf:org/gated"], {}),
        ("unknown with a token", ["hf:org/nobody"], {}),
        ("after the network went", ["hf:org/llama"], {}),
        ("registry without network", ["timm:test_resnet"], {}),
        ("never seen without network", ["hf:org/other"], {}),
    ]
    with HubServer(models) as server:
        hidden = ("HF_", "HUGGING", "TRANSFORMERS_", "http", "HTTP")
        env = {k: v for k, v in os.environ.items() if not k.startswith(hidden)} | {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(root / "home"),
            "PYTHONPATH": str(ROOT),
            "NO_PROXY": "127.0.0.1",
        }
        command = [sys.executable, "-c", DOWNLOADS, json.dumps(cases), TOKEN]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.rpartition("RESULTS")[2])
    return types.SimpleNamespace(shas=shas, requests=server.requests, **{"of": results, "log": done.stderr})


def test_hub_downloads_record_the_commit(downloads: types.SimpleNamespace) -> None:
    of, shas = downloads.of, downloads.shas
    assert of["timm repository"]["framework"] == "timm" and of["timm repository"]["licence"] == "mit"
    assert of["timm repository"]["revision"] == shas["timm"] and of["timm repository"]["repository"] == "org/timm"
    assert of["newest"]["revision"] == shas["new"] and of["newest"]["first"] == 0
    assert of["newest"]["source"] == "hf:org/llama" and of["newest"]["kind"] == "text"
    assert of["tag"] == of["commit"] and of["tag"]["revision"] == shas["old"]
    assert of["tag"]["first"] != 0 and of["tag"]["licence"] == "cc-by-4.0"
    assert of["only .bin"]["first"] == of["tag"]["first"]
    assert of["registry"]["repository"] == "timm/test_resnet.r160_in1k"
    assert of["registry"]["revision"] == of["registry pinned"]["revision"] == shas["registry"]
    assert of["registry"]["first"] == of["registry pinned"]["first"]


def test_hub_refusals_are_one_helpful_line(downloads: types.SimpleNamespace) -> None:
    of = downloads.of
    for name in ("unknown", "unknown with a token", "registry not there"):
        assert "there is no hf:" in of[name], of[name]
    assert "no revision 'v9'" in of["unknown revision"]
    assert "config.json" in of["bare"]
    assert "already quantised" in of["quantised"] and "x.gguf" in of["no such gguf"]
    assert "gated" in of["gated"] and "hf auth login" in of["gated"]
    assert "hf auth login" in of["gated with a wrong token"]
    assert of["gated with a token"]["kind"] == "text"
    assert all("\n" not in message for message in of.values() if isinstance(message, str))


def test_hub_cache_serves_when_the_network_is_gone(downloads: types.SimpleNamespace) -> None:
    of = downloads.of
    assert of["after the network went"] == of["newest"] and of["registry without network"] == of["registry"]
    assert "cannot reach the hub" in of["never seen without network"]


def test_hub_requests_are_no_more_than_needed(downloads: types.SimpleNamespace) -> None:
    fetched = [path for method, path in downloads.requests if method == "GET" and "/resolve/" in path]
    assert not any("onnx" in path for path in fetched)
    assert not any("org/quantised" in path and "safetensors" in path for path in fetched)
    assert len(fetched) == len(set(fetched))
