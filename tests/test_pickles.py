"""Snapshots of EDM and EDM2: what is read equals what was written, and nothing in a file is ever executed."""

import contextlib
import copyreg
import functools
import io
import os
import pickle
import struct
import subprocess
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from scoresde.interop.edm.snapshot import Record, network_of, read_pickle


class EasyDict(dict):
    """Theirs has attribute access besides, of which nothing is written."""


def _reconstruct_persistent_obj(meta):
    raise AssertionError("the loader of the snapshot was called")


EasyDict.__module__ = "dnnlib.util"
_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class Persistent:
    """Reduces itself as a persistent object does: its class's source text, its name and its attributes."""

    source = "raise SystemExit('the source code of a snapshot was executed')"

    def __reduce__(self):
        state = super().__reduce__()[2]
        meta = dict(type="class", version=6, module_src=self.source, class_name=type(self).__name__, state=state)
        return _reconstruct_persistent_obj, (meta,), None


class Block(Persistent, nn.Module):
    def __init__(self, width, attention=False):
        super().__init__()
        self._init_args, self._init_kwargs, self.skip = (width,), dict(attention=attention), None
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.register_parameter("bias", None)
        self.register_buffer("resample", torch.ones(2, 2, dtype=torch.float16))
        self.register_buffer("scratch", torch.full((5,), 7.0), persistent=False)


class EDMPrecond(Persistent, nn.Module):
    def __init__(self, width=4, **kwargs):
        super().__init__()
        self._init_args, self._init_kwargs = (), EasyDict(width=width, sigma_data=np.float64(0.5), **kwargs)
        self.table = nn.ModuleDict({"8x8": Block(width), "4x4": Block(width, attention=True)})
        self.layers = nn.ModuleList([nn.Linear(width, 3).bfloat16(), nn.SiLU(), nn.Linear(3, 2, bias=False).half()])
        self.tied = self.tied_too = nn.Linear(2, 2)
        self.other = nn.Linear(2, 2)
        self.other.weight = self.tied.weight
        self.view = nn.Parameter(torch.arange(12.0).reshape(3, 4).t()[1:], requires_grad=False)
        self.empty, self.scalar = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.register_buffer("steps", torch.arange(4))


class EDMLoss(Persistent):
    def __init__(self):
        self._init_args, self._init_kwargs, self.P_mean = (), {}, -1.2


class Encoder(Persistent):
    """EDM2's keep arrays of NumPy and leave the autoencoder out of what they write."""

    def __init__(self):
        self._init_args = self._init_kwargs = None
        self.scale, self.bias = np.float32(0.5) / np.float32([4.17, 4.62]), np.asfortranarray(np.ones((2, 3)))
        self.strided = np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2)


def dumped(content, protocol=4):
    fakes = {n: types.ModuleType(n) for n in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")}
    fakes["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj
    fakes["dnnlib.util"].EasyDict = EasyDict
    sys.modules.update(fakes)
    try:
        return pickle.dumps(content, protocol)
    finally:
        for name in fakes:
            del sys.modules[name]


def written(tmp_path, content, protocol=4):
    path = tmp_path / "snapshot.pkl"
    path.write_bytes(content if isinstance(content, bytes) else dumped(content, protocol))
    return path


@pytest.fixture(scope="module")
def net():
    return EDMPrecond(img_resolution=8, label_dim=10, dtype=torch.float32)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_everything_in_a_snapshot_is_read(tmp_path, net, protocol):
    more = [{1, "a"}, frozenset({2}), b"x", b"", bytearray(b"q"), torch.device("cuda:0"), torch.Size([3]), 2.5, -1]
    more += [2**70, True, (1, (2,)), torch.float16, OrderedDict(a=1), np.zeros((0, 2)), nn.Linear, net.view]
    options = EasyDict(path="a.zip", max=None)
    content = EasyDict(ema=net, loss_fn=EDMLoss(), encoder=Encoder(), dataset_kwargs=options, more=more)
    path = written(tmp_path, content, protocol)
    read, record = read_pickle(path), network_of(path)
    assert not {"torch_utils", "dnnlib"} & set(sys.modules)
    state, expected = record.state_dict(), net.state_dict()
    assert list(state) == list(expected)
    assert "table.8x8.scratch" not in state
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)  # compares types and shapes too
        assert not tensor.requires_grad
    assert state["tied.weight"].data_ptr() == state["tied_too.weight"].data_ptr() == state["other.weight"].data_ptr()
    EDMPrecond().load_state_dict(state)
    assert (record.class_name, record.module, record.init_args) == ("EDMPrecond", "torch_utils.persistence", ())
    assert record.init_kwargs == net._init_kwargs
    linear = record.state["_modules"]["tied"]
    assert (linear.class_name, linear.module, linear.state["in_features"]) == ("Linear", "torch.nn.modules.linear", 2)
    blocks = record.state["_modules"]["table"].state["_modules"]
    assert (blocks["4x4"].init_args, blocks["4x4"].init_kwargs) == ((4,), {"attention": True})
    assert (read["loss_fn"].class_name, read["loss_fn"].state["P_mean"]) == ("EDMLoss", -1.2)
    assert (read["dataset_kwargs"], read["encoder"].init_kwargs) == (options, {})
    for name in ("scale", "bias", "strided"):
        array = vars(content["encoder"])[name]
        assert read["encoder"].state[name].dtype == array.dtype
        np.testing.assert_array_equal(read["encoder"].state[name], array)
    assert read["more"][:-3] == more[:-3]
    assert read["more"][-3].shape == (0, 2)
    assert not callable(read["more"][-2])
    assert read["more"][-1] is read["ema"].state["_parameters"]["view"]
    assert len(repr(record)) < 300


def test_the_network_is_found_or_the_keys_are_listed(tmp_path):
    assert network_of(written(tmp_path, {"net": nn.Linear(2, 1)})).class_name == "Linear"
    assert network_of(written(tmp_path, {"ema": None, "net": nn.Linear(2, 1)})).class_name == "Linear"
    path = written(tmp_path, {"G_ema": nn.Linear(2, 1), "loss_fn": EDMLoss(), 3: "x"})
    assert network_of(path, "G_ema").class_name == "Linear"
    with pytest.raises(ValueError, match=r"'ema' or 'net'; it holds 'G_ema' \(a Linear\), 'loss_fn' \(a EDMLoss\), 3"):
        network_of(path)
    with pytest.raises(ValueError, match="no network under 'loss_fn'"):
        network_of(path, "loss_fn")
    with pytest.raises(ValueError, match=r"EDMLoss.*is not the record of an nn\.Module"):
        read_pickle(path)["loss_fn"].state_dict()


def test_other_files_are_told_apart(tmp_path, net):
    with pytest.raises(FileNotFoundError, match=r"none\.pkl"):
        read_pickle(tmp_path / "none.pkl")
    with pytest.raises(ValueError, match="is a folder"):
        read_pickle(tmp_path)
    archive, older = io.BytesIO(), io.BytesIO()
    torch.save(net.state_dict(), archive)
    torch.save({}, older, _use_new_zipfile_serialization=False)
    cases = {b"": "empty", archive.getvalue(): r"torch\.save", b"<!DOCTYPE html>": "web page", b"\x1f\x8b\x08": "gzip"}
    cases |= {b"version https://git-lfs.github.com": "LFS", b"# hello": "does not start", b"\x80\x09.": "not start"}
    cases |= {pickle.dumps({"a": 1}, 0): "does not start", pickle.dumps({"a": 1}, 1): "does not start"}
    cases |= {older.getvalue(): "holds a int", pickle.dumps([1]): "holds a list", dumped(nn.SiLU()): "holds a SiLU"}
    for data, message in cases.items():
        with pytest.raises(ValueError, match=message):
            read_pickle(written(tmp_path, data))


class Call:
    """Pickles as a call of any function, as in every published attack."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def refused(tmp_path, data, *names):
    """The file is refused naming what it asks for, and what it would run has not run."""
    with pytest.raises(ValueError) as caught:
        read_pickle(written(tmp_path, data))
    assert not (tmp_path / "ran").exists()
    assert "Nothing in it was executed" in str(caught.value)
    for name in names:
        assert name in str(caught.value)


def touch(tmp_path):
    return f"open({str(tmp_path / 'ran')!r}, 'w').close()"


def test_calls_are_refused_by_name(tmp_path):
    code = touch(tmp_path)
    calls = {
        f"{os.name}.system": (os.system, f"touch {tmp_path}/ran"), "builtins.eval": (eval, code),
        "builtins.exec": (exec, code), "builtins.getattr": (getattr, "x", "upper"), "numpy": (np.load, "x"),
        "builtins.__import__": (__import__, "os"), "subprocess.Popen": (subprocess.Popen, ["touch", f"{tmp_path}/ran"]),
        "functools.partial": (functools.partial, eval, code), "torch.serialization.load": (torch.load, "x"),
        "copyreg._reconstructor": (copyreg._reconstructor, OrderedDict, dict, {}),
    }  # fmt: skip
    for name, call in calls.items():
        refused(tmp_path, dumped({"ema": Call(*call)}), "it names", name)
        refused(tmp_path, dumped({"ema": nn.ModuleDict({"a": nn.Linear(1, 1)}), "z": [Call(*call)]}, 2), "it names")
    pickle.loads(dumped(Call(exec, code)))  # the same bytes do run where pickle reads them
    assert (tmp_path / "ran").exists()


def test_names_are_only_compared(tmp_path):
    for module, name in [
        ("torch.nn.modules.module", "os.system"), ("torch.nn.modules.module", "torch"), ("torch.nn.modules", "os"),
        ("torch.nn.modules.linear.Linear", "__init__"), ("collections", "OrderedDict.__reduce__"), ("torch", "load"),
        ("torch.storage", "_load_from_bytes.__globals__"), ("torch", "storage._load_from_bytes"), ("", "eval"),
        ("torch.nn.modules..linear", "Linear"), ("torch.nn.modules.linear\n", "Linear"), ("dnnlib.util", "open_url"),
        ("torch_utils.persistence", "_src_to_module"), ("numpy.core.multiarray", "fromfile"), ("torch", "float32.x"),
    ]:  # fmt: skip
        data = b"\x80\x04" + pickle.dumps(module, 4)[11:-1] + b"\x8c" + bytes([len(name)]) + name.encode() + b"\x93."
        refused(tmp_path, data, "it names")
    refused(tmp_path, b"\x80\x02cos\x1b[2J\nsystem\n.", r"os\x1b[2J.system")  # and shown without steering a terminal


LAYER = b"ctorch.nn.modules.linear\nLinear\n"
MAKE = {  # what may be on the stack when an instruction comes that would act on it
    "layer": LAYER + b")\x81", "built layer": LAYER + b")\x81}b", "class": LAYER, "function": b"c_codecs\nencode\n",
    "OrderedDict": b"ccollections\nOrderedDict\n)R", "EasyDict": b"cdnnlib.util\nEasyDict\n)\x81", "list": b"]",
    "set": b"\x8f", "type": b"ctorch\nfloat32\n", "text": b"X\x01\x00\x00\x00a", "none": b"N", "tuple": b")",
    "array": pickle.dumps(np.ones(2), 3)[2:-1], "tensor": pickle.dumps(torch.ones(2), 3)[2:-1],
}  # fmt: skip


def test_instructions_act_only_on_what_they_are_for(tmp_path):
    text = {n: b"X" + struct.pack("<I", len(n)) + n.encode() for n in ("__class__", "__reduce__", "__setstate__", "k")}
    extensions = {b"Na.": "list", b"(NNe.": "list", b"(NN\x90.": "set", b"NNs.": "OrderedDict EasyDict"}
    for name, made in MAKE.items():
        for attribute in text.values():
            state = b"}" + attribute + MAKE["function"] + b"s"
            for operands in (state, b"N" + state + b"\x86", state + b"N\x86"):
                if (name, attribute, operands) != ("layer", text["k"], state):
                    refused(tmp_path, b"\x80\x04" + made + operands + b"b.", "was refused")
        for tail, kinds in extensions.items():
            if name not in kinds.split():
                refused(tmp_path, b"\x80\x04" + made + tail, "was refused")
        if name != "function":
            refused(tmp_path, b"\x80\x04" + made + b"(NtR.", "calls")  # REDUCE
        refused(tmp_path, b"\x80\x04" + made + b"(Nt\x81.", "makes")  # NEWOBJ with arguments
        refused(tmp_path, b"\x80\x04" + made + b")}\x92.", "NEWOBJ_EX")
    refused(tmp_path, b"\x80\x04" + MAKE["function"] + b"]R.", "not a tuple")


def test_instructions_no_snapshot_needs_are_refused(tmp_path, monkeypatch):
    command = f"S'touch {tmp_path}/ran'\n".encode()
    for name, data in {
        "STRING": b"(" + command + b"ios\nsystem\n.", "INST": b"(ios\nsystem\n.", "OBJ": b"(" + LAYER + b"o.",
        "os.system": b"(cos\nsystem\n" + command + b"o.", "PERSID": b"Pabc\n.", "BINPERSID": b"X\x01\x00\x00\x00aQ.",
        "NEXT_BUFFER": b"\x97\x98.", "READONLY_BUFFER": b"N\x98.", "DUP": b"N2.", "protocol 7": b"\x80\x07N.",
    }.items():  # fmt: skip
        refused(tmp_path, b"\x80\x02" + data, "was refused", name)
    monkeypatch.setitem(copyreg._inverted_registry, 0x7B, ("builtins", "exec"))
    monkeypatch.setitem(copyreg._extension_cache, 0x7B, exec)  # a program that has registered it and used it before
    code = touch(tmp_path).encode()
    arguments = b"X" + struct.pack("<I", len(code)) + code + b"\x85R."
    for extension in (b"\x82\x7b", b"\x83\x7b\x00", b"\x84\x7b\x00\x00\x00"):
        refused(tmp_path, b"\x80\x02" + extension + arguments, "EXT")
    pickle.loads(b"\x80\x02\x82\x7b" + arguments)
    assert (tmp_path / "ran").exists()


def test_nothing_hides_in_the_bytes_of_a_tensor(tmp_path):
    def stored(data):
        return {"ema": Call(torch.storage._load_from_bytes, data)}

    call = Call(exec, touch(tmp_path))
    for newer in (False, True):
        stream = io.BytesIO()
        torch.save({"x": torch.ones(2), "y": call}, stream, _use_new_zipfile_serialization=newer)
        refused(tmp_path, stored(stream.getvalue()), "not in the format" if newer else "the bytes of a tensor")
    real = torch.ones(3)._typed_storage().__reduce__()[1][0]
    refused(tmp_path, stored(real[:15] + pickle.dumps(call, 2)), "__builtin__.exec")
    refused(tmp_path, stored(real[:15] + pickle.dumps(call, 4)), "protocol")
    refused(tmp_path, stored(real[:15] + b"\x80\x02ctorch\nFloatStorage\n)R."), "instruction")
    for position in range(15, len(real)):  # a storage that was cut off
        refused(tmp_path, stored(real[:position]))
    with torch.serialization.safe_globals([exec]):  # what a program trusts elsewhere is not trusted here
        refused(tmp_path, stored(real[:-12].replace(b"ctorch\nFloatStorage", b"c__builtin__\nexec")), "exec")
    refused(tmp_path, stored(real.replace(b"K\x03", b"K\x7f")))
    unlisted = real[: real.rindex(b"]q\x00")] + b"]." + real[-20:]
    refused(tmp_path, stored(unlisted), "of the size")  # its memory would be read without having been written
    tensor = functools.partial(Call, torch._utils._rebuild_tensor_v2, torch.ones(3)._typed_storage())
    for places in [(0, (4,), (1,)), (0, (2, 2), (1, 2)), (1, (3,), (1,)), (1, (2,), (-1,)), (0, (1,), ())]:
        refused(tmp_path, {"ema": tensor(*places, False, {})}, "memory")
    refused(tmp_path, {"ema": tensor(0, (3,), (1,), False, {"a": 1})}, "hooks")
    refused(tmp_path, {"ema": Call(torch._utils._rebuild_parameter, "abc", True, OrderedDict())}, "parameter")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_are_of_numbers(tmp_path, protocol):
    objects = [np.array([Call(exec, touch(tmp_path))]), np.array([1], dtype=object), np.zeros(2, "f4,O")]
    for array in [*objects, np.array(["a"]), np.zeros(2, "V8")]:
        refused(tmp_path, dumped({"ema": array}, protocol))
    refused(tmp_path, dumped({"ema": np.zeros(2, "f4,f4")}, protocol), "not numeric")
    refused(tmp_path, dumped({"ema": np.zeros(2, np.dtype("f8").newbyteorder("S"))}, protocol), "byte order")
    data = dumped({"ema": np.arange(7.0)}, protocol)
    refused(tmp_path, data.replace(b"K\x07", b"K\x09"), "does not fit")


def test_source_code_in_the_file_is_not_compiled(tmp_path, net, monkeypatch):
    monkeypatch.setattr(Persistent, "source", touch(tmp_path) + "\n")
    path = written(tmp_path, {"ema": net})
    assert set(network_of(path).state_dict()) == set(net.state_dict())
    assert not (tmp_path / "ran").exists()
    assert "module_src" not in repr(vars(network_of(path)))
    for change in (dict(version=5), dict(type="module"), dict(class_name="a b"), dict(module_src=3), dict(state=[])):
        fields = dict(type="class", version=6, module_src="", class_name="A", state={}) | change
        refused(tmp_path, dumped({"ema": Call(_reconstruct_persistent_obj, fields)}))


def test_structures_without_end_are_refused(tmp_path):
    inside = Record("A", "m", state=dict(_parameters={}, _buffers={}, _modules={}))
    inside.state["_modules"]["again"] = inside
    with pytest.raises(ValueError, match="contains itself"):
        inside.state_dict()
    layer = nn.Linear(1, 1)
    for _ in range(60):  # 2^60 layers in a file of a few kilobytes
        layer = nn.ModuleList([layer, layer])
    with pytest.raises(ValueError, match="without end"):
        network_of(written(tmp_path, {"ema": layer})).state_dict()
    deep = b")" + b"\x85" * 300_000
    refused(tmp_path, b"\x80\x04}" + deep + b"Ns.", "keys")  # to hash it would exhaust the stack of the interpreter
    assert list(read_pickle(written(tmp_path, b"\x80\x04}N" + deep + b"s."))) == [None]
    refused(tmp_path, b"\x80\x04\x8e\xff\xff\xff\xff\xff\x00\x00\x00x.", "ends in the middle")  # 2^40 bytes
    refused(tmp_path, b"\x80\x04}r\xff\xff\xff\xff00.")  # a memo of 2^32 places


def test_damaged_files_raise_value_errors_only(tmp_path):
    data = dumped({"ema": Block(1), "encoder": Encoder(), "z": Call(exec, touch(tmp_path))})
    for end in [*range(0, len(data), 41), *range(len(data) - 40, len(data) + 1)]:
        refused(tmp_path, data[:end])
    data = dumped({"ema": Block(1), "encoder": Encoder()})
    for seed in range(150):
        g, changed = np.random.default_rng(seed), bytearray(data)
        for place in g.integers(2, len(data), 3):
            changed[place] = g.integers(256)
        with contextlib.suppress(ValueError):
            network_of(written(tmp_path, bytes(changed))).state_dict()
    assert network_of(written(tmp_path, data)).state_dict()
