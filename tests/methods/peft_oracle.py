"""PEFT on a tiny Llama, as an oracle for adapters."""

import copy
import dataclasses
import warnings

import numpy as np

from methods import models
from methods.adapters import load_peft


@dataclasses.dataclass(frozen=True)
class Llama:
    ours: models.Pretrained
    theirs: object
    torch: object
    peft: object

    def write(self, folder, seed=1, **fields):
        """An adapter as PEFT writes it, every number of it moved."""
        torch = self.torch
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = self.peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], **fields})
            adapted = self.peft.get_peft_model(copy.deepcopy(self.theirs), config)
            with torch.no_grad():
                for name, parameter in adapted.named_parameters():
                    if "lora_" in name:
                        parameter.add_(0.2 * torch.randn_like(parameter))
            adapted.save_pretrained(folder)
        return folder

    def merged(self, folder):
        """{module: W [in, out]} of the base model with what PEFT reads from the folder."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = self.peft.PeftModel.from_pretrained(copy.deepcopy(self.theirs), folder).merge_and_unload()
        weights = model.state_dict()
        return {name: weights[f"{name}.weight"].numpy().T for name in self.modules()}

    def read(self, folder):
        """What `load_peft` makes of the folder."""
        config, blocks = self.ours.config, self.ours.weights["blocks"]
        return load_peft(folder, self.ours.hf_names, config.site_shapes(), config.num_layers, base=blocks)

    def ours_merged(self, adapter):
        """As `merged`, of what `read` gives, by the formulas of `methods.adapters.hook`."""
        config, kernels = adapter.config, {}
        for site in self.ours.hf_names.modules:
            for layer, kernel in enumerate(np.asarray(self.ours.weights["blocks"][site]["kernel"])):
                if site in adapter.params and (config.layers is None or layer in config.layers):
                    a, b, *m = (np.asarray(leaf[layer]) for leaf in adapter.params[site].values())
                    rank = config.module(site, layer)[0]
                    kernel = kernel + config.module_scale(site, layer) * (a[:, :rank] @ b[:rank])
                    kernel = kernel * (m[0] / np.linalg.norm(kernel, axis=0))[None] if m else kernel
                kernels[self.ours.hf_names.module(site, layer)] = kernel
        return kernels

    def modules(self):
        names = self.ours.hf_names
        return [names.module(site, layer) for site in names.modules for layer in range(self.ours.config.num_layers)]

    def check(self, folder, changed=True):
        """Ours and PEFT's weights agree, and something was adapted."""
        wanted, found = self.merged(folder), self.ours_merged(self.read(folder))
        base = {name: module.weight.detach().numpy().T for name, module in self.linears()}
        for name in wanted:
            np.testing.assert_allclose(found[name], wanted[name], atol=1e-5, err_msg=name)
        assert changed == any(np.abs(wanted[name] - base[name]).max() > 0.05 for name in wanted)

    def linears(self):
        return [(name, self.theirs.get_submodule(name)) for name in self.modules()]
