"""Train a row of small models on one text, to see how a codec's loss goes with the size of a model.

    python benchmarks/small_models.py FOLDER --text wiki.valid.tokens
    for width in 64 128 256; do
      python benchmarks/spqr.py FOLDER/$width --calibration wiki.valid.tokens --text wiki.test.raw --only ".5 %"
    done

Llamas of four layers with a tokenizer of 1024 pieces, made from the text, and the same windows in the same order for all. They are
trained enough to have structure in their weights, not to be good: what they show is a trend and no more.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 1024
LENGTH, BATCH = 128, 16
RATE, WARM = 3e-3, 50


def train(width: int, ids: torch.Tensor, steps: int, folder: Path) -> None:
    """Train a model `width` wide and write it as a folder of transformers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=8 * width // 3 // 16 * 16,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=RATE * math.sqrt(64 / width), weight_decay=0.1, betas=(0.9, 0.95)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / WARM, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    generator, start, loss = torch.Generator().manual_seed(0), time.monotonic(), 0.0
    for step in range(1, steps + 1):
        places = torch.randint(len(ids) - LENGTH, (BATCH,), generator=generator)
        found = model(input_ids=(batch := ids[places[:, None] + torch.arange(LENGTH)]), labels=batch).loss
        optimiser.zero_grad()
        found.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        loss += (found.item() - loss) / min(step, 100)
        if step % 100 == 0:
            print(
                f"width {width}: step {step} of {steps}, loss {loss:.3f}, {time.monotonic() - start:.0f} s", flush=True
            )
    model.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--widths", default="64,128,256")
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # so that the same folders come out everywhere
    text = arguments.text.read_text()
    pieces = ByteLevelBPETokenizer()
    pieces.train_from_iterator([text], VOCABULARY, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces._tokenizer, bos_token="<s>", eos_token="</s>")
    ids = torch.tensor(pieces.encode(text).ids)
    print(f"{len(ids):,} tokens; {arguments.steps} steps of {BATCH} windows of {LENGTH}", flush=True)
    for width in map(int, arguments.widths.split(",")):
        train(width, ids, arguments.steps, arguments.folder / str(width))
        tokenizer.save_pretrained(arguments.folder / str(width))


if __name__ == "__main__":
    main()
