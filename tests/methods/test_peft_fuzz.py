"""Damaged and lying adapters: what PEFT gets out of them, or one sentence; never a hang, never another exception."""

import json
import shutil
import time

import numpy as np
import pytest

from tests.methods.lora_files import old_name

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
VALUES = (None, True, False, 0, 1, 2, 4, -1, 3.5, 10**12, 10**400, float("nan"), float("inf"), "", "x", "q_proj", "(")
VALUES += ("(a+)+$", r"(\w+\.?)+!", ".*", "pissa", "all", "é\n\x00", [], ["q_proj"], ["q_proj", "down_proj"], [0, 1, 2])
VALUES += (
    ["(a+)+$"],
    [[0, 2]],
    {},
    {"q_proj": 2},
    {"(a+)+$": 4},
    {"(": 4},
    {".*": 4},
    {"q_proj": [1]},
    {"a": {"b": []}},
)
RENAMES = (("lora_A", "lora_B"), ("layers.0", "layers.1"), ("weight", "bias"), ("model.", ""))


def of_config(rng, path):
    """A config with a field or two of it replaced, taken away or made up, or its text damaged."""
    settings = json.loads(path.read_text())
    for _ in range(rng.integers(1, 3)):
        name = str(rng.choice([*settings, "made_up"]))
        kind = rng.integers(6)
        if kind == 0:
            settings.pop(name, None)
        elif kind == 1:
            settings[name] = settings[str(rng.choice(list(settings)))]
        else:
            settings[name] = VALUES[rng.integers(len(VALUES))]
    text = bytearray(json.dumps(settings).encode())
    if rng.integers(4) == 0:
        damage(rng, text)
    path.write_bytes(bytes(text))


def damage(rng, data):
    """A byte changed, bytes put in, or the end cut off."""
    at = int(rng.integers(len(data)))
    kind = rng.integers(4)
    if kind == 0:
        del data[at:]
    elif kind == 1:
        data[at:at] = b"[{" * int(rng.choice([1, 5000]))
    else:
        data[at] = int(rng.integers(256))


def of_weights(rng, path):
    """A file of weights with a lying header, damaged bytes, or tensors renamed, dropped or of another shape."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    name = str(rng.choice([key for key in header if key != "__metadata__"]))
    entry, kind = header[name], rng.integers(12)
    if kind == 0:
        del header[name]
    elif kind == 1:
        old, new = RENAMES[rng.integers(len(RENAMES))]
        header[name.replace(old, new)] = header.pop(name)
    elif kind == 2:
        entry["shape"] = [int(rng.choice([0, 1, 4, 32, 10**6, 2**63])) for _ in range(rng.integers(4))]
    elif kind == 3:
        entry["shape"] = entry["shape"][::-1]
    elif kind == 4:
        entry["dtype"] = str(rng.choice(["F16", "BF16", "I32", "U8", "F8_E4M3", "F64", "C64", "X"]))
    elif kind == 5:
        entry["data_offsets"] = [int(rng.integers(-5, 2**31)), int(rng.integers(2**40))]
    elif kind == 6:
        start = entry["data_offsets"][0]
        body[start : start + 4] = np.float32(rng.choice([np.nan, np.inf, 3.0])).tobytes()
    elif kind == 7:
        header["__metadata__"] = {"format": str(rng.choice(["pt", "np", "tf"]))}
    elif kind == 8:
        body.extend(bytes(int(rng.integers(1, 64))))
    text = json.dumps(header).encode()
    length = len(text) if kind != 9 else int(rng.choice([0, 1, 2**20, 2**62, len(text) - 1]))
    data = bytearray(length.to_bytes(8, "little") + text + body)
    if kind >= 10:
        damage(rng, data)
    path.write_bytes(bytes(data))


@old_name
@pytest.mark.parametrize("file", [SETTINGS, WEIGHTS])
def test_three_hundred_mutants(llama, tmp_path, file):
    plain = llama.write(tmp_path / "plain", rank_pattern={"layers.1.*q_proj": 2}, use_dora=False)
    mutate = of_config if file == SETTINGS else of_weights
    read = refused = 0
    for seed in range(300):
        folder = tmp_path / str(seed)
        shutil.copytree(plain, folder)
        mutate(np.random.default_rng(seed), folder / file)
        start = time.perf_counter()
        try:
            adapter = llama.read(folder)
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 900, (seed, str(error))
            assert not isinstance(error, UnicodeError)
        else:
            read += 1
            wanted, found = llama.merged(folder), llama.ours_merged(adapter)
            for name in wanted:
                np.testing.assert_allclose(found[name], wanted[name], atol=1e-5, rtol=1e-5, err_msg=f"{seed} {name}")
        assert time.perf_counter() - start < 10, seed
        shutil.rmtree(folder)
    assert read > 10 and refused > 150
