"""What is on disk: files whole or not at all, records that are verified, variants that read back as they were."""

import json
import os
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from qeval.backends.stream.variant_reader import saved_variant
from qeval.errors import BrokenRecordError, QevalError, UsageError
from qeval.files.atomic import atomic_path, write_bytes, write_text
from qeval.files.records import find_record, verify_record, write_record
from qeval.files.tensors import save_tensors
from qeval.identity import digest_file
from qeval.quant.grid import FLOAT_GRIDS, Grid, PerBlock, PerChannel, PerTensor, parse
from qeval.quant.rtn import quantize_rtn
from qeval.quant.variant import Choice, FloatWeight, Variant
from qeval.store.rows import RowStore
from qeval.store.schema import ITEMS_SCHEMA, TOKENS_SCHEMA
from qeval.store.states import StateStore
from qeval.store.variants import (
    MANIFEST,
    WEIGHTS,
    Origin,
    load_variant,
    read_manifest,
    save_variant,
    verify_variant,
)
from tests.fixtures.pretend_gpu import pretend_gpu

ORIGIN = Origin(
    recipe={"method": "rtn"}, model={"name": "tiny"}, calibration={"source": "pydoc"}, float_bits=16, seconds=1.5
)
PLACES = [PerBlock(8), PerBlock(32), PerChannel(), PerTensor()]


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def matrix(rows=5, columns=37, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def variant(*grids):
    weights = {f"w{i}.weight": quantize_rtn(matrix(3 + i, 37 + i, seed=i), grid) for i, grid in enumerate(grids)}
    return Variant(
        key="abc",
        weights=weights,
        floats={
            "norm.weight": matrix(1, 9)[0],
            "half.weight": matrix(2, 3).half(),
            "brain.weight": matrix().bfloat16(),
        },
        input_scales={"w0.weight": torch.arange(37.0)},
        kept=(
            FloatWeight("norm.weight", 9, "a norm"),
            FloatWeight("half.weight", 6, "a rule"),
            FloatWeight("brain.weight", 185, "a rule"),
        ),
        choices=(Choice(0, "o", ("w0.weight",), 111, 0.1 + 0.2, None, 4), Choice(1, "down", (), 0, None, 1e-9, 8)),
        details={"rounding": "half to even"},
    )


def assert_equal(one, other):
    assert (one.key, one.kept, one.choices, dict(one.details)) == (
        other.key,
        other.kept,
        other.choices,
        dict(other.details),
    )
    assert list(one.weights) == list(other.weights)
    for name, weight in one.weights.items():
        again = other.weights[name]
        assert again.grid == weight.grid
        assert (again.codes.dtype, again.scales.dtype) == (torch.uint8, torch.float32)
        assert torch.equal(again.codes, weight.codes)
        assert torch.equal(again.scales, weight.scales)
        assert (again.zeros is None) == (weight.zeros is None)
        assert weight.zeros is None or torch.equal(again.zeros, weight.zeros)
        assert torch.equal(again.dequantize(), weight.dequantize())
    for kind in ("floats", "input_scales"):
        ours, theirs = getattr(one, kind), getattr(other, kind)
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_variant_reads_back_as_it_was(tmp_path, bits, place, symmetric):
    made = variant(Grid(bits, place, symmetric))
    save_variant(made, tmp_path / "v", ORIGIN)
    assert_equal(load_variant(tmp_path / "v"), made)
    assert {path.name for path in tmp_path.iterdir()} == {"v"}


@pytest.mark.parametrize("grid", [*FLOAT_GRIDS.values(), parse("int4-g32-signed"), parse("int8-tensor-half")], ids=str)
def test_a_variant_on_floats_reads_back_to_the_bit(tmp_path, grid):
    made = replace(variant(grid), weights={"w0.weight": quantize_rtn(matrix(300, 290) * 0.02, grid)})
    save_variant(made, tmp_path / "v", ORIGIN)
    found = load_variant(tmp_path / "v")
    assert_equal(found, made)
    one, other = found.weights["w0.weight"].global_scale, made.weights["w0.weight"].global_scale
    assert one == other
    (entry,) = read_manifest(tmp_path / "v").weights
    assert entry.grid == str(grid)
    # rows of the file, wherever they begin and end, are those of the matrix
    (stored,) = [each for each in saved_variant(tmp_path / "v").tensors.values() if each.shape == (300, 290)]
    for start, stop in ((0, 300), (100, 131), (127, 129), (255, 300)):
        rows = torch.empty(stop - start, 290)
        stored.decode(stored.fetch(start, stop), rows)
        assert torch.equal(rows, made.weights["w0.weight"].dequantize()[start:stop])


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("nvfp4", 4 + 8 / 16 + 32 / (256 * 512)), ("mxfp4-floor", 4 + 8 / 32), ("mxfp8-rceil", 8 + 8 / 32),
        ("mxfp6-e3m2-even", 6 + 8 / 32), ("fp8-channel", 8 + 32 / 512), ("fp8-tensor", 8 + 32 / (256 * 512)),
        ("fp8-tile128", 8 + 32 / 128**2), ("nf4", 4 + 32 / 64), ("int4-g32-signed", 5),
    ],
)  # fmt: skip
def test_bits_per_weight_are_those_of_the_file(tmp_path, name, bits):
    made = replace(
        variant(), weights={"w0.weight": quantize_rtn(matrix(256, 512), parse(name))}, input_scales={}, floats={}
    )
    assert made.bits_per_weight == pytest.approx(bits, rel=1e-9)
    save_variant(made, tmp_path / "v", ORIGIN)
    data = (tmp_path / "v" / WEIGHTS).read_bytes()
    assert len(data) - 8 - int.from_bytes(data[:8], "little") == made.quantized_bits / 8


def test_a_variant_of_many_grids_and_its_manifest(tmp_path):
    grids = [Grid(4, PerBlock(32)), Grid(8, PerChannel()), Grid(3, PerTensor(), symmetric=False)]
    made = variant(*grids)
    save_variant(made, tmp_path / "deep" / "v", ORIGIN)
    assert_equal(load_variant(tmp_path / "deep" / "v"), made)
    manifest = read_manifest(tmp_path / "deep" / "v")
    assert [entry.grid for entry in manifest.weights] == ["int4-g32", "int8-channel", "int3-tensor-asym"]
    assert manifest.bits_per_weight == made.bits_per_weight
    assert manifest.size_bytes == made.size_bytes(16)
    assert (manifest.recipe, manifest.model, manifest.calibration) == (ORIGIN.recipe, ORIGIN.model, ORIGIN.calibration)


def test_the_packed_file_is_as_large_as_the_variant_says(tmp_path):
    """Each row's codes end on a whole byte and the format has a header; nothing else may be in the file."""
    made = variant(Grid(4, PerBlock(32)), Grid(3, PerBlock(8), symmetric=False), parse("nvfp4"), parse("mxfp6"))
    save_variant(made, tmp_path / "v", ORIGIN)
    data = (tmp_path / "v" / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    rows = sum(len(weight.codes) for weight in made.weights.values())
    tensors = made.quantized_bits / 8 + 9 * 4 + 6 * 2 + 185 * 2
    assert tensors <= len(data) - header <= tensors + 2 * rows


def test_saving_again_replaces_a_variant_and_nothing_else(tmp_path):
    save_variant(variant(Grid(4, PerChannel())), tmp_path / "v", ORIGIN)
    newer = variant(Grid(8, PerChannel()))
    save_variant(newer, tmp_path / "v", ORIGIN)
    assert_equal(load_variant(tmp_path / "v"), newer)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for place in ("mine", "file"):
        with pytest.raises(UsageError, match="exists and is no variant; name another folder"):
            save_variant(newer, tmp_path / place, ORIGIN)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert {path.name for path in tmp_path.iterdir()} == {"v", "mine", "file"}


def test_a_file_of_tensors_is_as_readable_as_any_other_new_file(tmp_path):
    (tmp_path / "other").touch()
    save_tensors({"weight": torch.ones(2, 2)}, tmp_path / "weights")
    assert (tmp_path / "weights").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_an_error_while_saving_leaves_nothing_and_keeps_the_old_variant(tmp_path, monkeypatch):
    old = variant(Grid(4, PerChannel()))
    save_variant(old, tmp_path / "v", ORIGIN)

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qeval.store.variants.save_tensors", full)
    for name in ("v", "new"):
        with pytest.raises(QevalError, match=rf"Cannot write .*/{name}: No space left on device\."):
            save_variant(variant(Grid(8, PerChannel())), tmp_path / name, ORIGIN)
    assert {path.name for path in tmp_path.iterdir()} == {"v"}
    assert_equal(load_variant(tmp_path / "v"), old)


def test_a_broken_variant_is_named(tmp_path):
    folder = tmp_path / "v"
    save_variant(variant(Grid(4, PerChannel())), folder, ORIGIN)
    whole = (folder / WEIGHTS).read_bytes()
    for data in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        (folder / WEIGHTS).write_bytes(data)
        with pytest.raises(BrokenRecordError, match=rf"{folder / WEIGHTS} is missing, torn or was changed"):
            load_variant(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(BrokenRecordError, match="is missing, torn or was changed"):
        verify_variant(folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    for text, where in [
        ("{", "the whole file"),
        (json.dumps(manifest | {"format_version": 3}), "format_version"),
        (json.dumps(manifest | {"colour": "red"}), "colour"),
    ]:
        (folder / MANIFEST).write_text(text)
        with pytest.raises(BrokenRecordError, match=rf"{folder / MANIFEST} is torn or of another version \({where}\)"):
            read_manifest(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(UsageError, match=rf"'{folder}' holds no variant: there is no manifest.json in it"):
        read_manifest(folder)


def test_a_variants_weights_are_hashed_once_a_process_and_again_when_they_change(tmp_path, monkeypatch):
    folder, hashed = tmp_path / "v", []
    save_variant(variant(Grid(4, PerChannel())), folder, ORIGIN)
    monkeypatch.setattr("qeval.files.hashes.digest_file", lambda path: (hashed.append(path), digest_file(path))[1])
    for _ in range(3):
        load_variant(folder)
    assert hashed == [folder / WEIGHTS]

    whole, times = (folder / WEIGHTS).read_bytes(), (folder / WEIGHTS).stat()
    (folder / WEIGHTS).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    os.utime(folder / WEIGHTS, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(BrokenRecordError, match="is missing, torn or was changed"):
        verify_variant(folder)
    assert len(hashed) == 2


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("error", [RuntimeError("torn"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_file_appears_whole_or_not_at_all(tmp_path, old, error):
    path = tmp_path / "file.bin"
    if old is not None:
        path.write_bytes(old)
    before = files(tmp_path)
    expected = QevalError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught, atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert files(tmp_path) == before
    if isinstance(error, OSError):
        assert str(caught.value) == (
            f"Cannot write {path}: No space left on device. What was written before it is kept."
        )


def test_a_file_is_replaced_only_at_the_end(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "old é")
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"new")
        assert temporary.parent == path.parent
        assert path.read_text(encoding="utf-8") == "old é"
    assert files(tmp_path) == {str(path.relative_to(tmp_path)): b"new"}
    write_bytes(path, b"\x00")
    assert path.read_bytes() == b"\x00"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(QevalError, match=rf"Cannot write {tmp_path}/file/x: (Not a directory|File exists)\."):
        write_text(tmp_path / "file" / "x", "text")


def record(folder, key="key", data=b"content", suffix=".bin"):
    return write_record(folder, key, suffix, lambda path: path.write_bytes(data) and None)


def test_records_are_found_by_key_and_verified_by_content(tmp_path):
    heard = []
    path = record(tmp_path)
    assert find_record(tmp_path, "key", ".bin", heard.append) == path
    assert find_record(tmp_path, "ke", ".bin", heard.append) is None
    assert find_record(tmp_path / "none", "key", ".bin", heard.append) is None
    assert record(tmp_path) == path
    assert record(tmp_path, key="other").name.partition("-")[2] == path.name.partition("-")[2]
    assert record(tmp_path, key="third", data=b"else").name.partition("-")[2] != path.name.partition("-")[2]
    assert len(files(tmp_path)) == 3
    assert heard == []
    verify_record(path)


@pytest.mark.parametrize("data", [b"", b"conten", b"Content"])
def test_a_broken_record_is_named_removed_and_counts_as_not_done(tmp_path, data):
    path, heard = record(tmp_path), []
    path.write_bytes(data)
    with pytest.raises(BrokenRecordError, match=f"{path} is torn or was changed: its checksum does not fit its name"):
        verify_record(path)
    assert path.exists()
    assert find_record(tmp_path, "key", ".bin", heard.append) is None
    assert not path.exists()
    assert len(heard) == 1
    assert str(path) in heard[0]


def test_a_broken_record_beside_a_whole_one_is_passed_over(tmp_path):
    path, heard = record(tmp_path), []
    (tmp_path / f"key-{'0' * 16}.bin").write_bytes(b"torn")
    assert find_record(tmp_path, "key", ".bin", heard.append) == path
    assert len(heard) == 1


def test_a_record_whose_writing_fails_leaves_nothing(tmp_path):
    def fail(path):
        path.write_bytes(b"half")
        raise RuntimeError("torn")

    with pytest.raises(RuntimeError, match="torn"):
        write_record(tmp_path, "key", ".bin", fail)
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - hidden files count


def test_states_read_back_and_a_torn_file_counts_as_not_done(tmp_path):
    heard = []
    store = StateStore(tmp_path, heard.append)
    states = matrix(7, 16)
    path = store.write("key", states)
    assert torch.equal(store.read("key"), states)
    assert store.read("other") is None
    path.write_bytes(path.read_bytes()[:-4])
    assert store.read("key") is None
    assert len(heard) == 1


def test_states_stay_on_a_gpu_as_long_as_there_is_room(tmp_path):
    with pretend_gpu() as log:
        device = torch.device("cuda:0")
        store = StateStore(tmp_path, print, device, room=7 * 16 * 4)
        store.write("first", matrix(7, 16).to(device))
        store.write("second", matrix(7, 16))
        log.moved.clear()
        first, second = store.read("first"), store.read("second")
        assert first.device.type == "cuda"
        assert second.device.type == "cpu"  # the room is taken
        assert not log.moved
        assert torch.equal(first.cpu(), second)
        again = StateStore(tmp_path, print, device, room=1 << 20)
        assert again.read("second") is again.read("second")


def token_rows(variant_name="rtn", window=0):
    empty = {field.name: [None, None] for field in TOKENS_SCHEMA}
    places = {"window": [window, window], "position": [0, 1], "token": [5, 6], "nll": [None, 0.1 + 0.2]}
    return empty | places | {"variant": [variant_name] * 2, "backend": ["torch"] * 2, "corpus": ["pydoc"] * 2}


def test_rows_read_back_in_the_order_of_their_shards(tmp_path):
    store = RowStore(tmp_path)
    shards = [store.write("tokens", f"k{i}", token_rows(name, i)) for i, name in enumerate(("rtn", "awq", "rtn"))]
    store.keep_only({"tokens": shards[::-1], "items": []})
    table = store.read("tokens")
    assert table.schema == TOKENS_SCHEMA
    assert table["variant"].to_pylist() == ["rtn", "rtn", "awq", "awq", "rtn", "rtn"]
    assert table["window"].to_pylist() == [0, 0, 1, 1, 2, 2]
    assert table["nll"].to_pylist() == [None, 0.1 + 0.2] * 3
    assert store.read("items").equals(ITEMS_SCHEMA.empty_table())
    store.keep_only({"tokens": shards[1:2]})
    assert set(store.read("tokens")["variant"].to_pylist()) == {"awq"}
    assert store.find("tokens", "k0", pytest.fail) == shards[0]


def test_rows_of_another_schema_are_not_written(tmp_path):
    rows = token_rows()
    del rows["nll"]
    with pytest.raises((KeyError, pa.ArrowInvalid)):
        RowStore(tmp_path).write("tokens", "key", rows)
    assert files(tmp_path) == {}


def test_rows_that_are_missing_torn_or_foreign_are_named(tmp_path):
    store = RowStore(tmp_path)
    with pytest.raises(UsageError, match=rf"'{tmp_path}' holds no finished rows"):
        store.read("tokens")
    path = store.write("tokens", "key", token_rows())
    store.keep_only({"tokens": [path]})
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(BrokenRecordError, match=f"{path} is torn or was changed"):
        store.read("tokens")
    path.unlink()
    with pytest.raises(BrokenRecordError, match=f"{path} is missing; run the same command again"):
        store.read("tokens")
    table = pa.table({"variant": ["rtn"]})
    foreign = write_record(store.root / "tokens", "key", ".parquet", lambda part: pq.write_table(table, part))
    store.keep_only({"tokens": [foreign]})
    with pytest.raises(BrokenRecordError, match=f"{foreign} has other columns"):
        store.read("tokens")
    for text in ("{", "[]", '"text"', '{"tokens": 3}', '{"tokens": [3]}'):
        (store.root / "index.json").write_text(text)
        with pytest.raises(BrokenRecordError, match=r"index.json is torn"):
            store.read("tokens")
