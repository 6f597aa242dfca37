"""A random checkpoint of 7B parameters, and what the streamed probe takes for it: memory, reads, time.

    .venv/bin/python benchmarks/scale.py OUT                 # 13.5 GB are written to OUT/checkpoint once
    .venv/bin/python benchmarks/scale.py OUT --layers 4      # a small one, to try

Two processes probe it after one another: one streams, one has a single layer in memory and takes it for every layer,
which is the arithmetic alone. Peak resident memory is the system's own count for each process, mapped files included; bytes
read are those of the parts that were loaded.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import aletheia
from aletheia.anatomy.checkpoint import Checkpoint
from aletheia.libraries import quiet_libraries
from aletheia.probing.streamed import peak_bytes
from aletheia.probing.tally import draw

WIDTHS = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
SIDES = ("streamed", "arithmetic")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--data", default="../shared/data/gsm8k/train.jsonl")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--side", choices=SIDES)
    args = parser.parse_args()
    quiet_libraries()
    folder = args.out / "checkpoint"
    if args.side:
        print(json.dumps(measured(folder, args)))
        return
    if not (folder / "config.json").exists():
        write_checkpoint(folder, args.layers)
    found = {}
    for side in SIDES:
        command = [sys.executable, __file__, str(args.out), "--side", side, "--data", args.data]
        command += ["--tokens", str(args.tokens), "--dtype", args.dtype]
        found[side] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
        print(side, found[side], flush=True)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    streamed, alone = found["streamed"], found["arithmetic"]
    print(f"checkpoint        {size / 1e9:.2f} GB")
    print(
        f"peak resident     {streamed['peak'] / 1e9:.2f} GB, of which {streamed['before'] / 1e9:.2f} GB before the probe"
    )
    print(
        f"growth            {(streamed['peak'] - streamed['before']) / 1e9:.2f} GB, predicted {streamed['predicted'] / 1e9:.2f} GB at most"
    )
    print(f"read              {streamed['read'] / size:.2f} x the checkpoint")
    print(
        f"time              {streamed['seconds']:.0f} s, {streamed['seconds'] / alone['seconds']:.2f} x the arithmetic alone ({alone['seconds']:.0f} s)"
    )


def write_checkpoint(folder: Path, layers: int) -> None:
    """A Llama of random weights in bfloat16, a shard per layer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**WIDTHS, num_hidden_layers=layers, torch_dtype="bfloat16", tie_word_embeddings=False)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).state_dict().items()}
    generator, index = torch.Generator().manual_seed(0), {}
    for number in range(-1, layers):
        prefix = f"model.layers.{number}."
        chosen = [name for name in shapes if (name.startswith(prefix) if number >= 0 else ".layers." not in name)]
        shard = f"model-{number + 2:05d}-of-{layers + 1:05d}.safetensors"
        tensors = {
            name: torch.ones(shapes[name], dtype=torch.bfloat16)
            if len(shapes[name]) == 1
            else (0.02 * torch.randn(shapes[name], generator=generator)).to(torch.bfloat16)
            for name in chosen
        }
        save_file(tensors, folder / shard, {"format": "pt"})
        index |= dict.fromkeys(chosen, shard)
        print(f"wrote {shard}", flush=True)
    about = {"metadata": {"total_size": 0}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(about))
    tokenizer = Tokenizer(
        models.BPE(vocab={c: at for at, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["</s>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)


def measured(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """One side in this process."""
    checkpoint = Checkpoint(str(folder), args.dtype)
    data = aletheia.load_data(args.data, checkpoint.tokenizer, args.tokens, skip_unusable=True)
    full = [index for index, row in enumerate(data.examples) if len(row) == args.tokens]
    data = data.subset(full)
    before = peak_rss()
    predicted = peak_bytes(checkpoint, draw(data, 5, 1, 0), ahead=True)
    if args.side == "arithmetic":
        layer = checkpoint.layer(0)
        checkpoint.read_layers = lambda order, ahead: ((index, layer) for index in order)
    read = []
    fill = checkpoint._fill
    checkpoint._fill = lambda model, part, *others: (
        read.append(checkpoint.stored_bytes(part)) or fill(model, part, *others)
    )
    started = time.perf_counter()
    scores = aletheia.probe_streamed(checkpoint, data)
    return {
        "seconds": time.perf_counter() - started,
        "peak": peak_rss(),
        "before": before,
        "predicted": predicted,
        "read": sum(read),
        "loss": scores.probe.mean_loss,
    }


def peak_rss() -> int:
    """Of this process; getrusage would count its parent's, too."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(fields["VmHWM"].split()[0])


if __name__ == "__main__":
    main()
