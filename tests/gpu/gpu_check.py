"""What only a graphics card can show, in at most five minutes: `make test-gpu`. Without a CUDA device it says so in
one line and does nothing.

Every check is a function of a device and runs on a CPU as well, small, in tests/test_gpu_check.py; here they run on
the card at the size of an InternVL3.5-8B
with random weights, which is enough to measure memory and throughput. Checks compare with a CPU or with the
written-out form; measurements assert nothing.
Log, numbers and provenance go to exports/reference/gpu; a check that did not run is written down as "not measured"
with its reason.
"""
import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, InternVLForConditionalGeneration

from sfa_core.models.sequences import answer_loss, training_batch
from sfa_core.structure.inject import dense_attention, inject, structural_attention
from sfa_core.documents.generate import documents
from sfa_core.documents.samples import samples
from sfa_core.models.embedded import EmbeddedConfig, build_processor, model_config, train_tokenizer
from sfa_core.models.evaluate import evaluate
from sfa_core.core.families import family_of
from sfa_core.training.finetune import finetune
from sfa_core.training.arms import FinetuneConfig
from sfa_core.core.memory import MemoryProbe, held_bytes
from sfa_core.models.load import load_model, quantized_layers
from sfa_core.core.bundle import Bundle
from sfa_core.core.paths import REPOSITORY
from sfa_core.training.placement import LanguageSide, cut_loss
from sfa_core.runs.results import provenance, write_json, write_summary, write_timings
from sfa_core.structure.bias import StructuralBias
from sfa_core.structure.geometry import uniform_geometry

BUDGET = 300       # seconds for everything
GIB = 2**30


@dataclass(frozen=True)
class Size:
    "How large the checks are."

    model: EmbeddedConfig
    vocabulary: int   # rows of the embeddings; those of a checkpoint are far more than the tokens of the tokenizer
    tokens: int       # side of the patch grid in the check of the kernel
    heads: int
    batch: int        # documents of a training step, in the measurement of throughput
    steps: int        # measured training steps
    questions: int    # answered in the measurement of evaluation
    page: int         # pixels of a side of a page
    tiles: int        # most tiles of a page in evaluation


FULL = Size(
    EmbeddedConfig(image_size=448, vision_width=1024, vision_layers=24, vision_heads=16, vision_hidden=4096,
                   language_width=4096, language_layers=36,
                   language_heads=32, language_kv_heads=8, head_dim=128, language_hidden=12288, downsample_ratio=0.5,
                   layer_scale=0.1,
                   initializer_range=0.02, max_positions=40960),
    vocabulary=151936, tokens=32, heads=16, batch=16, steps=6, questions=64, page=896, tiles=12)
SMALL = Size(
    EmbeddedConfig(image_size=56, vision_width=64, vision_layers=2, vision_heads=2, vision_hidden=128,
                   language_width=64, language_layers=2,
                   language_heads=2, language_kv_heads=1, head_dim=32, language_hidden=128, downsample_ratio=0.5),
    vocabulary=512, tokens=6, heads=2, batch=2, steps=2, questions=4, page=112, tiles=2)


# ---- tools

def synchronise(device: str) -> None:
    "Wait for what was started on a device."
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


class Peak:
    """Measure seconds, and the most bytes alive at once, of a `with` block on a device: what the allocator says on
    a card, what a probe counts on a CPU."""

    def __init__(self, device: str):
        self.device, self.cuda = device, torch.device(device).type == "cuda"
        self.seconds = self.bytes = 0

    def __enter__(self):
        synchronise(self.device)
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.probe = MemoryProbe()
            self.probe.__enter__()
        self.began = time.perf_counter()
        return self

    def __exit__(self, *error):
        synchronise(self.device)
        self.seconds = time.perf_counter() - self.began
        if self.cuda:
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self.probe.__exit__(*error)
            self.bytes = self.probe.peak


def random_bundle(size: Size, device: str, dtype: torch.dtype, tiles: int = 1) -> Bundle:
    "Build an InternVL of a given size with random weights, on its device and in its dtype from the start."
    tokenizer = train_tokenizer([row["questions"][0]["question"] for row in documents(20, seed=1)], 512)
    settings = model_config(size.model, tokenizer)
    settings.text_config.vocab_size = max(size.vocabulary, len(tokenizer))
    settings.tie_word_embeddings = settings.text_config.tie_word_embeddings = False
    torch.manual_seed(0)
    with torch.device(device):
        model = InternVLForConditionalGeneration._from_config(settings, dtype=dtype).eval()
    ids = settings.text_config
    model.generation_config = GenerationConfig(eos_token_id=ids.eos_token_id, pad_token_id=ids.pad_token_id,
                                               do_sample=False)
    return Bundle(model, build_processor(tokenizer, size.model, tiles), family_of(model), "random InternVL",
                  revision="random")


def quantise_language(bundle: Bundle, device: str) -> None:
    "Store the linear layers of the language model in NF4, one after the other."
    import bitsandbytes  # prints a warning where there is no card, so not before one is there

    language = bundle.family.language_of(bundle.model)
    for name, layer in [(name, layer) for name, layer in language.named_modules() if type(layer) is torch.nn.Linear]:
        low = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None,
                                         compute_dtype=layer.weight.dtype,
                                         quant_type="nf4", device="meta")
        low.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4",
                                                module=low).to(device)
        low.bias = layer.bias
        parent, _, child = name.rpartition(".")
        setattr(language.get_submodule(parent), child, low)


def gradients(bundle: Bundle, batch: dict, loss: Callable) -> tuple[float, dict[str, torch.Tensor]]:
    "Return the mean loss of a batch, and the gradients of encoder, structure and projector, on the CPU."
    bundle.model.requires_grad_(False)
    parts = bundle.family.tower_of(bundle.model), bundle.family.projector_of(bundle.model)
    weights = {f"{i}.{name}": weight for i, part in enumerate(parts)
               for name, weight in part.requires_grad_(True).named_parameters()}
    total, targets = loss(bundle.model, batch)
    (total / targets).backward()
    found = {name: weight.grad.float().cpu() for name, weight in weights.items() if weight.grad is not None}
    bundle.model.zero_grad(set_to_none=True)
    return total.item() / targets, found


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    "Return the largest difference of two sets of gradients, as a share of the largest gradient of the same weight."
    assert ours.keys() == theirs.keys() and theirs, "the same weights have gradients"
    return max(float((ours[name] - value).abs().max() / value.abs().max().clamp_min(1e-6))
               for name, value in theirs.items())


# ---- checks

def low_rank_kernel(device: str, size: Size, folder: Path) -> dict[str, float]:
    """The stock kernel with appended factors equals the written-out bias, forwards and backwards, and never holds a
    matrix of all pairs."""
    found, geometry = {}, uniform_geometry(size.tokens, size.tokens, 1).map(lambda tensor: tensor.to(device))
    bias = StructuralBias(size.heads, seed=0).to(device)
    with torch.no_grad():
        for weight in bias.parameters():
            # as trained ones are
            weight.copy_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    bias.geometry = geometry
    module = torch.nn.Module()
    module.structure, module.structure_cache = bias, None
    draw = torch.Generator().manual_seed(2)
    inputs = [torch.randn(2, size.heads, geometry.tokens, 64, generator=draw).to(device) for _ in range(3)]
    upstream = torch.randn(2, geometry.tokens, size.heads, 64, generator=draw).to(device)

    def run(attend, dtype, rounded):
        given = [tensor.to(rounded).to(dtype, copy=True).requires_grad_(True) for tensor in inputs]
        with Peak(device) as peak:
            output = attend(module, *given, None)[0]
            (output.float() * upstream).sum().backward()
        results = dict(enumerate([output.detach(), *(tensor.grad for tensor in given)])) | {
            f"weight {name}": weight.grad.clone()
            for name, weight in bias.named_parameters() if weight.grad is not None}
        bias.zero_grad(set_to_none=True)
        return {name: value.float().cpu() for name, value in results.items()}, peak

    for dtype, bound in ((torch.float32, 2e-3), (torch.bfloat16, 0.1)):
        (ours, peak), (oracle, written_out) = run(structural_attention, dtype,
                                                  dtype), run(dense_attention, torch.float32, dtype)
        name = str(dtype).removeprefix("torch.")
        found |= {f"{name}_difference": largest_difference(ours, oracle), f"{name}_peak_gib": peak.bytes / GIB,
                  f"{name}_seconds": peak.seconds}
        assert found[f"{name}_difference"] < bound, found
    return found | {"written_out_peak_gib": written_out.bytes / GIB,
                    "pairs_gib": 2 * size.heads * geometry.tokens**2 * 4 / GIB}


def two_devices(device: str, size: Size, folder: Path) -> dict[str, float]:
    "A model on one device, or cut into two, has the loss and the gradients it has on a CPU."
    pairs = ["cpu,cpu", f"cpu,{device}", f"{device},cpu", device]
    if torch.cuda.device_count() > 1 and device == "cuda:0":
        pairs.append("cuda:0,cuda:1")
    rows, found = list(documents(3, seed=5)), {}
    reference = load_model("embedded", placement="cpu")
    inject(reference, seed=3)
    loss, theirs = gradients(reference, training_batch(reference, rows), answer_loss)
    for placement in dict.fromkeys(pairs):
        bundle = load_model("embedded", placement=placement)
        inject(bundle, seed=3)
        for name, make in (("stock", lambda bundle: answer_loss),
                           ("cut", lambda bundle: cut_loss(LanguageSide(bundle)))):
            value, ours = gradients(bundle, training_batch(bundle, rows), make(bundle))
            found[f"{placement} {name}"] = difference = largest_difference(ours, theirs)
            assert abs(value - loss) < 1e-3 * loss and difference < 1e-2, (placement, name, value, loss, difference)
    return found


def nf4(device: str, size: Size, folder: Path) -> dict[str, float]:
    """A language model in NF4 loses and learns on the device as it does on a CPU; encoder and projector stay as
    they are."""
    rows, found = list(documents(3, seed=5)), {}
    losses, theirs = {}, {}
    for place in ("cpu", device):
        bundle = load_model("embedded", precision="float32", language_bits=4, placement=place)
        layers = {part: quantized_layers(part_of(bundle.model)) for part, part_of in
                  (("language", bundle.family.language_of), ("tower", bundle.family.tower_of),
                   ("projector", bundle.family.projector_of))}
        assert layers["language"] and not layers["tower"] and not layers["projector"], layers
        losses[place], theirs[place] = gradients(bundle, training_batch(bundle, rows), answer_loss)
    found["difference"] = largest_difference(theirs[device], theirs["cpu"])
    full = load_model("embedded", placement=device)
    losses["float32"], _ = gradients(full, training_batch(full, rows), answer_loss)
    assert abs(losses[device] - losses["cpu"]) < 0.02 * losses["cpu"] and found["difference"] < 0.1, (losses, found)
    return found | {f"loss_{name}": value for name, value in losses.items()}


def autocast(device: str, size: Size, folder: Path) -> dict[str, float]:
    "Training in bfloat16 keeps learning weights in float32, computes in bfloat16, and follows training in float32."
    rows, curves, seen = documents(8, seed=6), {}, set()
    for precision in ("float32", "bfloat16"):
        bundle = load_model("embedded", precision=precision, placement=device)
        layer = next(module for module in bundle.family.tower_of(bundle.model).modules()
                     if type(module) is torch.nn.Linear)

        def note(module, given, output, precision=precision):
            seen.add((precision, str(module.weight.dtype), str(output.dtype)))

        hook = layer.register_forward_hook(note)
        config = FinetuneConfig("vision", steps=4, batch_size=4, questions=2, learning_rate=1e-4, structure_rate=1e-3)
        curves[precision] = finetune(bundle, rows, config, folder / precision, progress=False).log.loss.to_numpy()
        hook.remove()
    assert seen == {("float32", "torch.float32", "torch.float32"),
                    ("bfloat16", "torch.float32", "torch.bfloat16")}, seen
    difference = float(abs(curves["bfloat16"] / curves["float32"] - 1).max())
    assert difference < 0.05, curves
    return {"loss_difference": difference, "last_loss": float(curves["bfloat16"][-1])}


# ---- measurements

def train_steps(bundle: Bundle, size: Size, folder: Path, batch: int, steps: int, checkpointing: bool,
                device: str) -> dict[str, float]:
    """Train the arm `vision` a few steps and measure the largest memory and the documents of a second, the first
    step left out."""
    data = documents(2 * batch, seed=8, size=size.page)
    config = FinetuneConfig("vision", steps=steps + 1, batch_size=batch, questions=1, checkpointing=checkpointing,
                            tiles=1, checkpoint_every=0)
    with Peak(device) as peak:
        log = finetune(bundle, data, config, folder, progress=False).log
    seconds = log.seconds.to_numpy()
    return {"peak_gib": peak.bytes / GIB, "documents_per_second": batch * steps / (seconds[-1] - seconds[0]),
            "loss": float(log.loss.iloc[-1]),
            "pieces": int(log.parts.max())}


def throughput(device: str, size: Size, folder: Path) -> dict[str, float]:
    "Training in bfloat16: documents of a second and peak memory."
    bundle = random_bundle(size, device, torch.bfloat16)
    return train_steps(bundle, size, folder / "throughput", size.batch, size.steps, False,
                       device) | {"batch": size.batch}


def evaluation(device: str, size: Size, folder: Path) -> dict[str, float]:
    "Answering pages of several tiles, one by one and in batches: questions of a second and peak memory."
    bundle, asked, found = random_bundle(size, device, torch.bfloat16,
                                         size.tiles), samples(documents(size.questions, seed=9, size=size.page)), {}
    asked = list({sample.document: sample for sample in asked}.values())[: size.questions]
    # kernels are chosen at the first call
    evaluate(bundle, asked[:1], batch_size=1, max_new_tokens=2, tiles=size.tiles, draws=100)
    for name, batch, some in (("single", 1, asked[: max(2, len(asked) // 8)]), ("batched", min(16, len(asked)), asked)):
        with Peak(device) as peak:
            records = evaluate(bundle, some, batch_size=batch, max_new_tokens=16, tiles=size.tiles, draws=100).records
        assert len(records) == len(some) and not records["error"].any(), "every question has its record"
        found |= {f"{name}_questions_per_second": len(some) / peak.seconds, f"{name}_peak_gib": peak.bytes / GIB,
                  f"{name}_batch": batch}
    return found | {"speed_up": found["batched_questions_per_second"] / found["single_questions_per_second"]}


def nf4_memory(device: str, size: Size, folder: Path) -> dict[str, float]:
    "Training one document at a time with the language model in NF4 and recomputed activations: peak memory."
    bundle = random_bundle(size, device, torch.bfloat16)
    quantise_language(bundle, device)
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    parts = dict(language=bundle.family.language_of(bundle.model), encoder=bundle.family.tower_of(bundle.model),
                 head=bundle.model.lm_head)
    held = {f"{name}_gib": held_bytes([part]) / GIB for name, part in parts.items()}
    return train_steps(bundle, size, folder / "nf4", 1, size.steps, True, device) | held


CHECKS = (low_rank_kernel, two_devices, nf4, autocast, nf4_memory, throughput, evaluation)


def run_checks(device: str, size: Size, budget: float, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    "Run all checks one after the other; one that fails, or for which no time is left, is written down as such."
    began, found = time.monotonic(), {}
    for check in CHECKS:
        name, since = check.__name__, time.monotonic()
        if since - began > budget:
            found[name] = {"not_measured": f"{budget:g} s were over"}
        else:
            with tempfile.TemporaryDirectory() as scratch:
                try:
                    found[name] = check(device, size, Path(scratch))
                except torch.OutOfMemoryError as error:
                    found[name] = {"not_measured": f"out of memory: {error}".splitlines()[0]}
                except Exception as error:
                    say(traceback.format_exc())
                    found[name] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
            found[name] |= {"check_seconds": time.monotonic() - since}
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
        values = ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                           for key, value in found[name].items())
        say(f"{name}: {values}")
    return found


def main(arguments: list[str] | None = None) -> int:
    "Run everything on the first card and keep what was found; 1 when a check failed."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "exports" / "reference" / "gpu")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds after which no further check is begun")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tests/gpu: skipped, there is no CUDA device")
        return 0
    facts, lines, began = provenance({}, {}), [], time.time()

    def say(text):
        print(text, flush=True)
        lines.append(text)

    say(f"{torch.cuda.get_device_name(0)}, {torch.cuda.device_count()} device(s), torch {torch.__version__}, "
        f"bitsandbytes {version('bitsandbytes')}")
    found = run_checks("cuda:0", FULL, options.budget, say)
    failed = [name for name, values in found.items() if "failed" in values]
    options.out.mkdir(parents=True, exist_ok=True)
    write_timings(options.out, found)
    write_json(options.out / "provenance.json",
               facts | {"what": "make test-gpu", "wall_seconds": round(time.time() - began, 1)})
    write_summary(options.out, "\n".join(line for line in lines if not line.startswith("Traceback")))
    (options.out / "log.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(json.dumps({"failed": failed, "kept": str(options.out)}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
