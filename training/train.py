"""Trains the bundled models from scratch on scenes and stories: `python training/train.py plain` or `outlier`.

The outlier model has channels of the kind that make large models hard to quantize. They are not a
rescaling that could be undone: the large side (norm gains, up-projection rows) is held at 10 to 60 times
its usual size during the whole training while the weights that read it are kept at their usual size, so
the function that is learned uses both. Some are active for every token, some for vision tokens only, some
for few words of the vocabulary (see `Outliers`).
"""

import argparse
import json
import math
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from scenes import KINDS, ask, converse, draw_scene, paint, tell
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HIDDEN, INTERMEDIATE, LAYERS = 256, 640, 6


@dataclass(frozen=True)
class Recipe:
    seed: int = 1
    steps: int = 3500
    batch: int = 32
    stories: int = 3  # of the batch
    questions: int = 5
    answer_weight: float = 3.0
    story_weight: float = 0.5
    lr: float = 1.2e-3
    warmup: int = 150
    decay: float = 0.4  # share of the steps over which the learning rate falls
    weight_decay: float = 0.05


@dataclass(frozen=True)
class Outliers:
    """Which residual channels and up-projection rows are large, and for which tokens."""

    always: tuple[int, ...] = (7, 101, 190)
    vision: tuple[int, ...] = (33, 140, 222)
    words: tuple[tuple[int, ...], ...] = field(default=tuple((16 * g + 3, 16 * g + 11) for g in range(8)))
    up_rows: int = 6
    low: float = 10.0
    high: float = 60.0

    @property
    def residual(self) -> list[int]:
        return [*self.always, *self.vision, *(c for group in self.words for c in group)]


def build_tokenizer(rng: random.Random) -> PreTrainedTokenizerFast:
    corpus = []
    for _ in range(3000):
        corpus.append(tell(rng))
        corpus += [f"{q}\n{a}" for _, q, a in converse(draw_scene(rng), rng, 4)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left",
        additional_special_tokens=list(SPECIAL[1:]), chat_template=CHAT_TEMPLATE, model_max_length=2048,
    )  # fmt: skip


def build_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLConfig:
    token = tokenizer.convert_tokens_to_ids
    return Qwen2VLConfig(
        text_config={
            "vocab_size": 512, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS,
            "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
            # M-RoPE gives the lowest frequencies to rows and columns; with the usual theta of 10^4 to 10^6 and heads
            # of 32 they would hardly turn within a 3 by 4 grid.
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": token("<|endoftext|>"), "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config={"depth": 2, "embed_dim": 128, "hidden_size": HIDDEN, "num_heads": 4, "mlp_ratio": 4},
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False,
    )  # fmt: skip


def build_image_processor() -> Qwen2VLImageProcessorPil:
    """Scenes are multiples of 28 pixels and pass unresized; nothing above 16 by 16 cells gets in."""
    return Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 448 * 448})


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLForConditionalGeneration:
    """The model, with what makes training on two cores bearable (3 times faster, same function)."""
    model = Qwen2VLForConditionalGeneration._from_config(build_config(tokenizer), attn_implementation="eager")
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight.normal_(0, 0.5)
    patch = model.model.visual.patch_embed  # a convolution whose stride is its kernel is a linear
    patch.forward = lambda pixels: F.linear(pixels, patch.proj.weight.flatten(1))
    for layer in model.model.language_model.layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)
    return model


class Sampler:
    """Random training batches: conversations about fresh scenes, and stories."""

    def __init__(self, tokenizer, images, recipe: Recipe) -> None:
        self.tokenizer, self.images, self.recipe = tokenizer, images, recipe
        self.rng = random.Random(recipe.seed)
        self.cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self.cache[text]

    def conversation(self, cells: int, turns) -> tuple[list[int], list[int], list[float]]:
        """(token ids, labels, weights): the loss is on the answers and their end marks.

        Short answers, which need a look-up, weigh more than the many tokens of descriptions and stories.
        """
        ids, labels, weights = [], [], []
        for i, (kind, question, answer) in enumerate(turns):
            vision = "<|vision_start|>" + "<|image_pad|>" * cells + "<|vision_end|>" if i == 0 else ""
            ask_ids = (
                self.encode("<|im_start|>user\n" + vision)
                + self.encode(question)
                + self.encode("<|im_end|>\n<|im_start|>assistant\n")
            )
            answer_ids = self.encode(answer) + self.encode("<|im_end|>")
            ids += ask_ids + answer_ids + self.encode("\n")
            labels += [-100] * len(ask_ids) + answer_ids + [-100]
            weight = 1.0 if kind == "describe" else self.recipe.answer_weight
            weights += [weight] * (len(ask_ids) + len(answer_ids) + 1)
        return ids, labels, weights

    def batch(self) -> dict[str, torch.Tensor]:
        rows, pixels = [], []
        for i in range(self.recipe.batch):
            if i < self.recipe.stories:
                ids = self.tokenizer.encode(tell(self.rng), add_special_tokens=False) + self.encode("<|endoftext|>")
                rows.append((ids, ids, [self.recipe.story_weight] * len(ids)))
                continue
            scene = draw_scene(self.rng)
            pixels.append(paint(scene, self.rng, held_out=False))
            rows.append(self.conversation(scene.rows * scene.columns, converse(scene, self.rng, self.recipe.questions)))
        return self.collate(rows, pixels)

    def collate(self, rows, pixels) -> dict[str, torch.Tensor]:
        width = max(len(ids) for ids, _, _ in rows)
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        labels = torch.full((len(rows), width), -100)
        weights = torch.zeros(len(rows), width)
        for i, (row, target, weight) in enumerate(rows):  # padded on the right: causal attention never sees it
            ids[i, : len(row)] = torch.tensor(row)
            labels[i, : len(target)] = torch.tensor(target)
            weights[i, : len(weight)] = torch.tensor(weight)
        image = self.encode("<|image_pad|>")[0]
        batch = {"input_ids": ids, "labels": labels, "weights": weights, "mm_token_type_ids": (ids == image).int()}
        if pixels:
            batch |= self.images(pixels, return_tensors="pt")
        return batch


def hold_outliers(model, outliers: Outliers, seed: int):
    """Makes the outliers and returns the function that restores them after every optimizer step."""
    draw = torch.Generator().manual_seed(seed)
    text, merger = model.model.language_model, model.model.visual.merger.mlp[2]
    residual = torch.tensor(outliers.residual)
    words = torch.tensor([c for group in outliers.words for c in group])
    vision, always = torch.tensor(outliers.vision), torch.tensor(outliers.always)
    member = torch.zeros(text.embed_tokens.num_embeddings, len(words))
    group_of = torch.randint(0, 2 * len(outliers.words), (len(member),), generator=draw)  # half of them in none
    for g in range(len(outliers.words)):
        member[group_of == g, 2 * g : 2 * g + 2] = 1.0
    sign = torch.randint(0, 2, member.shape, generator=draw) * 2.0 - 1.0

    def gains(count: int) -> torch.Tensor:
        u = torch.rand(count, generator=draw)
        return outliers.low * (outliers.high / outliers.low) ** u

    held = []  # (norm gain, its values), and (up rows, their indices, norms)
    with torch.no_grad():
        text.embed_tokens.weight[:, always] = 0.7 + 0.2 * torch.randn(len(member), len(always), generator=draw)
        merger.bias[vision] = 0.7
        merger.bias[always] = 0.7
    for layer in text.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            held.append((norm.weight, residual, gains(len(residual))))
    rows = [torch.randperm(INTERMEDIATE, generator=draw)[: outliers.up_rows] for _ in text.layers]
    norms = [gains(outliers.up_rows) * layer.mlp.up_proj.weight.norm(dim=1).median().item() for layer in text.layers]

    @torch.no_grad()
    def keep_columns(weight: torch.Tensor, columns: torch.Tensor) -> None:
        size = weight.norm(dim=0)
        weight[:, columns] *= (size.median() / size[columns].clamp_min(1e-12)).clamp_min(1.0)

    @torch.no_grad()
    def restore() -> None:
        embedding = text.embed_tokens.weight
        embedding[:, vision] = 0.0
        embedding[:, words] = member * sign
        merger.weight[words] = 0.0
        merger.bias[words] = 0.0
        for column in always:
            embedding[:, column].clamp_(0.3, 1.2)
        merger.bias[torch.cat([vision, always])] = 0.7
        for weight, channels, values in held:
            weight[channels] = values
        for layer, row, norm in zip(text.layers, rows, norms, strict=True):
            layer.self_attn.o_proj.weight[residual] = 0.0
            layer.mlp.down_proj.weight[residual] = 0.0
            up = layer.mlp.up_proj.weight
            for reader in (
                layer.self_attn.q_proj,
                layer.self_attn.k_proj,
                layer.self_attn.v_proj,
                layer.mlp.gate_proj,
                layer.mlp.up_proj,
            ):
                keep_columns(reader.weight, residual)
            up[row] *= (norm / up[row].norm(dim=1).clamp_min(1e-12))[:, None]
            keep_columns(layer.mlp.down_proj.weight, row)

    restore()
    return restore


def build_optimizer(model, recipe: Recipe) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98), fused=True)


def schedule(step: int, recipe: Recipe) -> float:
    """Linear warm-up, constant, and a linear decay to a hundredth."""
    left = (recipe.steps - step) / (recipe.decay * recipe.steps)
    return min((step + 1) / recipe.warmup, max(0.01, min(1.0, left)))


def weighted_loss(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    weights = weights.flatten() * (labels.flatten() != -100)
    return (each * weights).sum() / weights.sum()


@torch.no_grad()
def evaluate(model, sampler: Sampler, per_kind: int = 30) -> dict[str, float]:
    """Exact match on fresh scenes with held-out handwriting, one question each, and story perplexity.

    An answer is what greedy decoding would give iff every token of it is the arg max, so one pass suffices.
    """
    rng = random.Random(977)
    result = {}
    model.eval()
    for kind in KINDS:
        rows, pixels = [], []
        while len(rows) < per_kind:
            scene = draw_scene(rng)
            asked = ask(scene, kind, rng)
            if asked is not None:
                rows.append(sampler.conversation(scene.rows * scene.columns, [(kind, *asked)]))
                pixels.append(paint(scene, rng, held_out=True))
        batch = sampler.collate(rows, pixels)
        labels = batch.pop("labels")[:, 1:]
        del batch["weights"]
        guess = model(**batch).logits[:, :-1].argmax(-1)
        result[kind] = ((guess == labels) | (labels == -100)).all(1).float().mean().item()
    result["accuracy"] = sum(result[k] for k in KINDS) / len(KINDS)
    rows = [sampler.tokenizer.encode(tell(rng), add_special_tokens=False) for _ in range(32)]
    batch = sampler.collate([(r, r, [1.0] * len(r)) for r in rows], [])
    labels, weights = batch.pop("labels")[:, 1:], batch.pop("weights")[:, 1:]
    loss = weighted_loss(model(**batch).logits[:, :-1].float(), labels, weights)
    result["story_perplexity"] = math.exp(loss.item())
    model.train()
    return {k: round(v, 4) for k, v in result.items()}


def train(name: str, recipe: Recipe, out: Path, init: Path | None) -> None:
    torch.manual_seed(recipe.seed)
    out.mkdir(parents=True, exist_ok=True)
    images = build_image_processor()
    # A continued model keeps its tokenizer: a new one would number the same words differently.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(init) if init else build_tokenizer(random.Random(0))
    tokenizer.save_pretrained(out)
    images.save_pretrained(out)
    model = build_model(tokenizer)
    if init is not None:
        start = Qwen2VLForConditionalGeneration.from_pretrained(init, dtype=torch.float32)
        model.load_state_dict(start.state_dict())
    outliers = Outliers()
    restore = hold_outliers(model, outliers, recipe.seed) if name == "outlier" else lambda: None
    optimizer = build_optimizer(model, recipe)
    sampler = Sampler(tokenizer, images, recipe)
    log = (out / "train.jsonl").open("w")
    print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    start, recent = time.time(), []
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * schedule(step, recipe)
        batch = sampler.batch()
        with torch.autocast("cpu", torch.bfloat16):
            labels, weights = batch.pop("labels")[:, 1:], batch.pop("weights")[:, 1:]
            logits = model(**batch, use_cache=False).logits[:, :-1]
        loss = weighted_loss(logits.float(), labels, weights)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        restore()
        recent.append(loss.item())
        last = step + 1 == recipe.steps
        if (step + 1) % 250 == 0 or last:
            row = {
                "step": step + 1,
                "loss": round(sum(recent) / len(recent), 4),
                "minutes": round((time.time() - start) / 60, 2),
                **evaluate(model, sampler),
            }
            recent = []
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(row, flush=True)
            if (step + 1) % 500 == 0 or last:
                save(model, out)
    (out / "recipe.json").write_text(
        json.dumps(
            {
                "model": name,
                **asdict(recipe),
                "outliers": asdict(outliers) if name == "outlier" else None,
            },
            indent=1,
        )
    )


def save(model, out: Path) -> None:
    """Weights as bf16, under the names that published Qwen2-VL checkpoints use."""
    copy = Qwen2VLForConditionalGeneration(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=["plain", "outlier"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--lr", type=float, default=Recipe.lr)
    parser.add_argument("--decay", type=float, default=Recipe.decay)
    parser.add_argument("--init", type=Path, help="start from this model's weights")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = Recipe(steps=args.steps, lr=args.lr, decay=args.decay)
    train(args.model, recipe, args.out or Path(__file__).parents[1] / "models" / args.model, args.init)
