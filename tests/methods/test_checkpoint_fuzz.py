"""Files that lie or are damaged: the right answer or one sentence, soon, and in little memory."""

import json
import random
import resource
import struct
import time
import warnings

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (gives numpy its bfloat16)
import numpy as np
import pytest

from methods import models
from methods.models.checkpoints import open_gguf
from tests.methods import checkpoint_files as files
from tests.methods.decoder_files import PLAIN, draw, save_gguf

MUTANTS = 300
SECONDS = 5.0
"""For one file; the first one imports transformers before the clock starts."""
GIGABYTES = 1.0
"""By which the process may grow in a test."""

VALUES = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 10**9, 3_473_412, 2**63, 10**30, 10**400, 0.0, -1.5, 1e308),
    *(float("nan"), float("inf"), "", "x", "../../x", "a" * 1000, [], {}, [1], ["a"], {"a": 1}, [[[]]]),
)
MORE_KEYS = (
    *("rope_scaling", "rope_parameters", "layer_types", "id2label", "num_labels", "architectures", "torch_dtype"),
    *("quantization_config", "sliding_window", "hidden_act", "tie_word_embeddings", "model_type", "head_dim", "foo"),
)
UNBOUNDED = ("max_position_embeddings", "sliding_window", "query_pre_attn_scalar", "pad_token_id")
"""Numbers that nothing is counted by: positions that turn have no table, and a window may be wider than any text."""
ROPES = ("linear", "yarn", "llama3", "dynamic", "longrope", "default", "su", 5)
ROPE_KEYS = ("low_freq_factor", "original_max_position_embeddings", "beta_fast", "short_factor", "mscale", "truncate")


def outcome(path):
    """Whether it loads. Fails on another error than one sentence, a long time, and weights that are not finite."""
    begin = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a head that is not read
            loaded = models.load(path)
        assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(loaded.weights))
    except (ValueError, FileNotFoundError) as error:
        sentence = str(error)
        assert str(path) in sentence and "\n" not in sentence and sentence.endswith(".") and len(sentence) < 700
        loaded = None
    assert time.monotonic() - begin < SECONDS
    return loaded is not None


@pytest.fixture(autouse=True)
def little_memory(tmp_path):
    outcome(files.save(tmp_path / "first", "llama"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GIGABYTES * 2**20


def other_bytes(good: bytes, rng: random.Random, within: int) -> bytes:
    """A copy with some of its first `within` bytes changed, cut out, put in, or made a number that lies."""
    data, at = bytearray(good), rng.randrange(within - 8)
    kind = rng.choice(("flip", "flip", "flip", "cut", "drop", "insert", "long", "long", "short"))
    if kind == "flip":
        for _ in range(rng.choice((1, 1, 2, 5, 20))):
            data[rng.randrange(within)] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    elif kind == "cut":
        del data[at:]
    elif kind == "drop":
        del data[at : at + rng.choice((1, 4, 8, 100))]
    elif kind == "insert":
        data[at:at] = rng.randbytes(rng.choice((1, 4, 8)))
    else:
        lie = rng.choice((0, 1, 10**9, 3_473_412, 2**31, 2**32 - 1))
        data[at : at + 4] = struct.pack("<I", lie)
        if kind == "long":
            data[at : at + 8] = struct.pack("<Q", rng.choice((lie, 2**40, 2**63, 2**64 - 1)))
    return bytes(data)


def other_config(good: dict, rng: random.Random) -> dict:
    config = dict(good)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.random()
        if kind < 0.55:
            config[rng.choice(list(good))] = rng.choice(VALUES)
        elif kind < 0.65:
            config.pop(rng.choice(list(good)), None)
        elif kind < 0.8:
            config[rng.choice(MORE_KEYS)] = rng.choice(VALUES)
        else:
            scaling = {rng.choice(("type", "rope_type")): rng.choice(ROPES), "factor": rng.choice((2.0, *VALUES))}
            config["rope_scaling"] = scaling | {rng.choice(ROPE_KEYS): rng.choice((1.0, 4, *VALUES))}
    return config


def test_configs_that_lie(tmp_path):
    rng, loads = random.Random(0), 0
    kinds = list(files.SETTINGS)
    folders = {kind: files.save(tmp_path / kind, kind) for kind in kinds}
    good = {kind: json.loads((folder / "config.json").read_text()) for kind, folder in folders.items()}
    for number in range(MUTANTS):
        kind = kinds[number % len(kinds)]
        (folders[kind] / "config.json").write_text(json.dumps(other_config(good[kind], rng)))
        loads += outcome(folders[kind])
    for _ in range(MUTANTS // 3):
        text = (json.dumps(good["llama"]) + " " * 9).encode()
        (folders["llama"] / "config.json").write_bytes(other_bytes(text, rng, len(text)))
        loads += outcome(folders["llama"])
    assert 0 < loads < MUTANTS


def test_safetensors_that_lie(tmp_path):
    rng, loads, folder = random.Random(1), 0, files.save(tmp_path / "f", "llama")
    good = (folder / "model.safetensors").read_bytes()
    header = 8 + struct.unpack("<Q", good[:8])[0]
    for number in range(MUTANTS):
        within = (16, header, len(good))[number % 3]
        (folder / "model.safetensors").write_bytes(other_bytes(good, rng, within))
        loads += outcome(folder)
    assert 0 < loads < MUTANTS


def test_indices_that_lie(tmp_path):
    rng, loads, folder = random.Random(2), 0, files.save(tmp_path / "f", "llama")
    files.shard(folder, "a.safetensors", "b.safetensors")
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    names = ("../f/a.safetensors", "/etc/passwd", "config.json", "b.safetensors", "", ".", "a\0b", "c", *VALUES)
    for number in range(MUTANTS):
        if number % 2:
            weight_map = dict(good["weight_map"])
            weight_map[rng.choice([*weight_map, "foo"])] = rng.choice(names)
            index.write_text(json.dumps(rng.choice((good | {"weight_map": weight_map}, weight_map, [good]))))
        else:
            text = json.dumps(good).encode()
            index.write_bytes(other_bytes(text, rng, len(text)))
        loads += outcome(folder)
    assert 0 < loads < MUTANTS


@pytest.mark.parametrize("scores", [False, True])
def test_gguf_files_that_lie(scores, tmp_path):
    rng, loads, path = random.Random(3), 0, tmp_path / "m.gguf"
    weights = draw(PLAIN, dtype=jnp.float32)
    extra = {"scores": [-float(i) for i in range(PLAIN.vocab_size)]} if scores else {}
    good = save_gguf(tmp_path / "good.gguf", PLAIN, weights, **extra).read_bytes()
    header = len(good) - sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    for number in range(MUTANTS // 2):
        path.write_bytes(other_bytes(good, rng, (700, header, len(good))[number % 3]))
        loads += outcome(path)
    assert 0 < loads < MUTANTS // 2


def header(tensors: int, entries: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + rest


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header(2**60, 0), "entries are announced"),
        (header(0, 2**60), "entries are announced"),
        (header(0, 1, struct.pack("<Q", 2**62)), "entries are announced"),
        (header(0, 1, text("a") + struct.pack("<IIQ", 9, 0, 2**60) + b"x" * 64), "entries are announced"),
        (header(0, 1, text("a") + struct.pack("<IIQ", 9, 8, 2**40) + b"x" * 64), "entries are announced"),
        (header(0, 1, text("a") + struct.pack("<I", 9) * 9 + b"x" * 64), "entries are announced"),
        (header(0, 1, text("a") + struct.pack("<I", 77) + b"x" * 64), "no value is of the kind 77"),
        (header(0, 2, (text("a") + struct.pack("<IB", 0, 1)) * 2), "'a' is there twice"),
        (header(1, 0, text("w") + struct.pack("<I", 2**31) + b"x" * 64), "w has 2147483648 dimensions"),
        (header(1, 0, text("w") + struct.pack("<IQIQ", 1, 2**40, 0, 0) + b"x" * 64), "bytes of w are not within"),
        (header(1, 0, text("w") + struct.pack("<IQIQ", 1, 8, 0, 2**50) + b"x" * 64), "bytes of w are not within"),
        (header(1, 0, text("w") + struct.pack("<IQIQ", 1, 33, 2, 0) + b"x" * 64), "no multiple of its blocks"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648 of the format"),
        (b"\x80\x04pickle", "does not begin with GGUF"),
    ],
)
def test_a_gguf_header_is_compared_with_the_file(data, message, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        models.load(path)
    assert "truncated or no GGUF file" in str(caught.value) and "\n" not in str(caught.value)


def test_tensors_that_overlap_are_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name in "ab":
        writer.add_tensor(name, np.ones(64, np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    data = (tmp_path / "m.gguf").read_bytes()
    assert open_gguf(tmp_path / "m.gguf").read("b").sum() == 64
    second, first = (b"b" + struct.pack("<IQIQ", 1, 64, 0, at) for at in (256, 0))
    (tmp_path / "m.gguf").write_bytes(data.replace(second, first)[:-256])
    with pytest.raises(ValueError, match="the tensors overlap"):
        open_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, r"is not valid JSON: fetch it again \(RecursionError"),
        ('{"model_type": ' + '{"a":' * 100_000, r"is not valid JSON: fetch it again \(RecursionError"),
        ('["llama"]', "holds .*, not an object of keys and values"),
        ("17", "holds 17, not an object"),
        (" " * 2**24 + "{}", "has 16777218 bytes, more than the 16777216"),
        ('{"model_type": "llama", "model_type": "gpt2"}', "the key 'model_type' is there twice"),
        ('{"hidden_size": 1' + "0" * 5000 + "}", "is not valid JSON"),
        ('{"model_type": ["llama"]}', "is of architecture"),
    ],
)
def test_a_config_is_one_object_of_a_sensible_size(text, message, tmp_path):
    folder = files.save(tmp_path, "llama")
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        models.load(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize("kind", files.SETTINGS)
@pytest.mark.parametrize("value", [10**9, 3_473_412, 10**400], ids=["billion", "millions", "huge"])
def test_no_number_of_a_config_is_believed(kind, value, tmp_path):
    folder = files.save(tmp_path, kind)
    for key in files.SETTINGS[kind]:
        if isinstance(files.SETTINGS[kind][key], int) and key != "tie_word_embeddings":
            files.save(folder, kind, **{key: value})
            loads = outcome(folder)
            assert not loads or key in UNBOUNDED
    files.save(folder, kind, num_labels=value)
    assert not outcome(folder)


# --- an index names files of its folder ----------------------------------------------------------------------------


def test_shards_may_lie_in_folders_and_have_one_name(tmp_path):
    plain = models.load(files.save(tmp_path / "plain", "llama"))
    folder = files.save(tmp_path / "shards", "llama")
    files.shard(folder, "a/model.safetensors", "b/model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, models.load(folder).weights, plain.weights)


def test_the_hub_keeps_its_files_elsewhere(tmp_path):
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "blobs").mkdir()
    folder = files.save(tmp_path / "snapshots" / "1234", "llama")
    files.shard(folder, "a.safetensors", "b.safetensors")
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).rename(tmp_path / "blobs" / name)
        (folder / name).symlink_to(tmp_path / "blobs" / name)
    assert outcome(folder)


@pytest.mark.parametrize("name", ["../outside.safetensors", "a/../../outside.safetensors", "ABSOLUTE", "LINK"])
def test_nothing_outside_the_folder_is_read(name, tmp_path):
    folder = files.save(tmp_path / "folder", "llama")
    files.shard(folder, "a.safetensors", "b.safetensors")
    outside, index = tmp_path / "outside.safetensors", folder / "model.safetensors.index.json"
    (folder / "b.safetensors").rename(outside)
    (folder / "b.safetensors").symlink_to(outside)
    name = {"ABSOLUTE": str(outside), "LINK": "b.safetensors"}.get(name, name)
    index.write_text(index.read_text().replace("b.safetensors", name))
    with pytest.raises(ValueError, match="which is outside the folder and is not read"):
        models.load(folder)


def test_an_index_and_its_shards_say_the_same(tmp_path):
    folder = files.save(tmp_path / "folder", "llama")
    single = (folder / "model.safetensors").read_bytes()
    files.shard(folder, "a.safetensors", "b.safetensors")
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    less = {name: file for name, file in good["weight_map"].items() if name != "model.norm.weight"}
    for home, message in (
        (good["weight_map"] | {"foo": "a.safetensors"}, "cannot give the tensor 'foo' that its index promises"),
        (dict.fromkeys(good["weight_map"], "a.safetensors"), "that its index promises"),
        (less, r"holds the tensor 'model\.norm\.weight', which its index does not name"),
    ):
        index.write_text(json.dumps({"weight_map": home}))
        with pytest.raises(ValueError, match=message):
            models.load(folder)
    index.write_text(json.dumps(good))
    (folder / "model.safetensors").write_bytes(single)
    with pytest.raises(ValueError, match=r"holds model\.safetensors and an index of other files"):
        models.load(folder)
    (folder / "b.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"is in .*a\.safetensors and in .*b\.safetensors"):
        models.load(folder)
