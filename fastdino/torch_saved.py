"""Files of torch.save from anybody: tensors and plain values are read; nothing of them is run or imported.

torch.load(weights_only=True) makes tensors and containers. A pickle is looked through before: what it calls
for must be among the few functions that make these, or among the settings that trainings save beside their
weights, for which a stand-in is put that keeps nothing. Memory and time are bounded by the file's size.
"""

import io
import pickletools
import re
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

# What torch makes: tensors, their parts, and containers.
MADE = re.compile(
    r"torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)"
    r"|torch\.(\w+Storage|storage\.(Typed|Untyped)Storage|Size|device|bool|[a-z]+\d\w*)"
    r"|collections\.(OrderedDict|Counter)|builtins\.(set|complex)|_codecs\.encode"
)
# Settings and counters beside the weights, as official DINO, DINOv2, Lightning, solo-learn, timm, mmselfsup
# and the numpy of before and after 2.0 write them.
SETTINGS = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace"
    r"|pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path"
    r"|datetime\.(date|datetime|time|timedelta|timezone)|decimal\.Decimal|fractions\.Fraction|uuid\.UUID"
    r"|numpy\.(dtype|ndarray|bool_?|str_|bytes_|u?int\d+|float\d+|complex\d+|dtypes\.\w+DType)"
    r"|numpy\.(core|_core)\.(multiarray\.(scalar|_reconstruct)|numeric\._frombuffer)"
    r"|numpy\.random\.(_pickle\.__\w+_ctor|(_mt19937|_pcg64|_philox|_sfc64|bit_generator)\.\w+)"
    r"|builtins\.(bool|bytes|float|frozenset|int|list|object|range|slice|str|tuple|type)|_?operator\.getitem"
    r"|typing\.\w+|omegaconf\.(base|dictconfig|listconfig|nodes)\.\w+"
    r"|ml_collections\.config_dict\.config_dict\.\w+|mmengine\.logging\.history_buffer\.HistoryBuffer"
    r"|torch\.torch_version\.TorchVersion|torch\.distributed\.fsdp\.api\.\w+"
    r"|torch\.optim\.(\w+\.)?[A-Z]\w*|torch\.optim\.lr_scheduler\.\w+"
)
# The same, which a pickle fills as dicts or lists.
DICTS = re.compile(
    r"builtins\.dict|collections\.defaultdict|(yacs|fvcore\.common|detectron2\.config)\.config\.CfgNode"
    r"|(lightning|pytorch_lightning|lightning_fabric)\.[\w.]+\.AttributeDict|mmengine\.config\.config\.ConfigDict"
    r"|mmcv\.utils\.config\.ConfigDict|addict\.addict\.Dict|easydict\.EasyDict|munch\.Munch"
)
LISTS = re.compile(r"collections\.deque")
# A key is hashed through all levels of a tuple: 60 of them that each hold the next twice take for ever.
MAX_TUPLES = 10_000_000


class _Setting:
    """Stands for a value that nobody needs; takes whatever the pickle gives it, and keeps nothing."""

    def __new__(cls, *arguments: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *arguments: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _Dict:
    def __new__(cls, *arguments: Any) -> Any:
        return OrderedDict()


class _List:
    def __new__(cls, *arguments: Any) -> Any:
        return []


def read_torch_saved(path: Path) -> Any:
    """What torch.save wrote to `path`: tensors on the CPU, containers, plain values; settings are empty.

    Tensors of a zip file, as torch has written since 1.6, stay on the disk until they are used.

    Raises:
        ValueError: it calls for anything else, is damaged, packed, or no file of torch.save.
    """
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\3\4"
        file.seek(0)
        names = _names_in_zip(path) if zipped else _names_in_stream(file)
    allowed: list[Any] = []
    for kind, stand_in in ((SETTINGS, _Setting), (DICTS, _Dict), (LISTS, _List)):
        allowed += [(stand_in, name) for name in names if kind.fullmatch(name)]
    if refused := names - {name for _, name in allowed} - {name for name in names if MADE.fullmatch(name)}:
        raise ValueError(
            f"it holds {', '.join(sorted(refused)[:8])}, neither a tensor nor a plain value, and nothing of "
            "a file is run; save the network's state_dict() alone"
        )
    with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's, about what a stranger's file looks like
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def _names_in_zip(path: Path) -> set[str]:
    """What the pickles in a zip file of torch.save call for; raises ValueError if it is another zip file."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        pickles = [record for record in records if record.filename.endswith("/data.pkl")]
        if not pickles:
            raise ValueError("it is a zip file, but not of torch.save")
        if any(record.filename.endswith("/constants.pkl") for record in records):
            raise ValueError("it is a TorchScript program: save the network's state_dict() instead")
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("its parts are compressed, as torch.save never does: unpack it or save it anew")
        if sum(r.file_size for r in records) > path.stat().st_size or min(r.header_offset for r in records):
            raise ValueError("its parts are not where torch.save puts them: the file is damaged")
        for record in pickles:
            del record.CRC  # torch.serialization.set_crc32_options(False) leaves one that is wrong
        return set().union(*(_names(io.BytesIO(archive.read(record))) for record in pickles))


def _names_in_stream(file: IO[bytes]) -> set[str]:
    """What a file of torch before 1.6 calls for: five pickles, of which the fourth is the content."""
    start = file.read(2)
    if start[:1] != b"\x80":
        raise ValueError(
            f"it begins with {start!r}, as no file of torch.save: give weights by torch or safetensors"
        )
    file.seek(0)
    names: set[str] = set()
    for _ in range(5):
        if file.read(1):  # another pickle than torch's may end here
            file.seek(-1, 1)
            names |= _names(file)
    return names


def _names(pickle: IO[bytes]) -> set[str]:
    """The functions and classes that a pickle calls for, as "module.name"; nothing is executed.

    Raises:
        ValueError: it is damaged, too deep, or encodes text with a codec other than numpy's latin1, some of
            which take a time that grows with the square of the text.
    """
    names: set[str] = set()
    memo: dict[Any, _Item] = {}
    stack: list[_Item] = []
    marks: list[int] = []
    total = 0
    for opcode, argument, _ in pickletools.genops(pickle):
        if opcode.name == "MARK":
            marks.append(len(stack))
        elif "PUT" in opcode.name or opcode.name == "MEMOIZE":
            memo[len(memo) if argument is None else argument] = stack[-1]
        else:
            before = opcode.stack_before
            marked = pickletools.markobject in before
            n = before.index(pickletools.markobject) if marked else len(before)
            start = (marks.pop() if marked else len(stack)) - n
            taken = stack[start:]
            del stack[start:]
            item = memo[argument] if "GET" in opcode.name else _made(opcode.name, argument, taken)
            if "GLOBAL" in opcode.name or opcode.name == "INST":
                names.add(item.value)
            total += item.objects - 1
            if total > MAX_TUPLES:
                raise ValueError("its pickle nests tuples too deeply")
            stack += [item] * len(opcode.stack_after)
    return names


class _Item(NamedTuple):
    """What a step of a pickle puts on its stack."""

    objects: int
    """How many a hash would go through."""
    value: Any
    """A text, a name, or the list of what it was made of."""


def _made(step: str, argument: Any, taken: list[_Item]) -> _Item:
    if step in ("GLOBAL", "INST", "STACK_GLOBAL"):
        module, name = argument.split(" ", 1) if argument else (str(item.value) for item in taken)
        # torch.save writes names as Python 2 had them
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        return _Item(1, f"{module}.{name}".encode("unicode_escape").decode())  # it may be shown
    if not step.startswith("TUPLE") and step not in ("REDUCE", "NEWOBJ"):
        return _Item(1, argument)
    values = [item.value for item in taken]
    if step == "REDUCE" and values[0] == "_codecs.encode" and values[1][1:] != ["latin1"]:
        raise ValueError("it holds _codecs.encode with another codec than latin1")
    return _Item(1 + sum(item.objects for item in taken), values)
