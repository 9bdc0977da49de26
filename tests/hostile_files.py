"""Files that no reader may trust: what stands in them, what they are instead of files, and where readers look."""
import io
import json
import os
import struct
import tempfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


MARK = Path(tempfile.gettempdir()) / f"code-was-run-{os.getpid()}"  # what code in a file would leave


PICKLED = f"cos\nmkdir\n(S{str(MARK)!r}\ntR.".encode()  # opened as a pickle it leaves the mark


def png(size=(8, 8)):
    stream = io.BytesIO()
    Image.new("RGB", size).save(stream, "PNG")
    return stream.getvalue()


def parquet():
    stream = io.BytesIO()
    pq.write_table(pa.table({"a": [1]}), stream)
    return stream.getvalue()


def archive():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("../evil", "x")
    return stream.getvalue()


def weights(header, body=b""):
    "A safetensors file with this header."
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + body


TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
TEXTS = {  # text in an encoding, or with an end, that is not expected
    "empty": b"", "blank": b" \n\t\n", "nothing but its mark": b"\xef\xbb\xbf",
    "two marks": b"\xef\xbb\xbf" * 2 + b"{}",
    "UTF-16": "{}".encode("utf-16"), "UTF-32": "{}".encode("utf-32"), "latin-1": "\"é\"".encode("latin-1"),
    "cut inside of a character": "\"é".encode()[:-1], "NUL": b"{}\0", "line separator": "\"\u2028\"".encode(),
    "next line": "{\u0085}".encode(), "old ends of lines": b"{}\r[]\r", "half a character": b"\"\\ud83d\"",
    "half a character as a key": b"{\"\\udc00\": 1}", "encoded half": b"\"\xed\xa0\xbd\"", "overlong": b"\"\xc0\xaf\"",
    "escapes": b"\x1b[2J\x1b]0;title\x07", "ten million letters": b"a" * 10**7,
}
VALUES = {  # JSON that is not what a reader expects
    "null": b"null", "true": b"true", "a number": b"-1", "a text": b"\"x\"", "a list": b"[]", "an object": b"{}",
    "a list of lists": b"[[[]]]", "a list of null": b"[null]", "NaN": b"NaN", "endless": b"-Infinity",
    "1e999": b"1e999",
    "very many digits": b"9" * 10_000, "a long number": b"[1" + b"0" * 4000 + b"]", "cut off": b"{\"a\": [1, 2",
    "twice": b"{\"a\": 1}{\"a\": 1}", "one key twice": b"{\"a\": 1, \"a\": []}", "comment": b"{} // none",
    "a single quote": b"{'a': 1}", "a proto": b"{\"__proto__\": {\"a\": 1}, \"__class__\": \"x\"}",
    "code": f"__import__('os').mkdir({str(MARK)!r})".encode(), "a tag of YAML": b"!!python/object/apply:os.getcwd []",
}
DEPTHS = {  # nested as deep as a stack, and deeper
    "lists": b"[" * 100_000, "closed lists": b"[" * 50_000 + b"]" * 50_000, "objects": b"{\"a\":" * 100_000,
    "lists in objects": b"{\"a\":[" * 50_000, "in a field": b"{\"arm\": " + b"[" * 100_000, "brackets": b"(" * 100_000,
}
FORMATS = {  # other formats under the name
    "PNG": png(),
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n{} loop\nshowpage\n%%EOF\n",
    "PDF": b"%PDF-1.7\n1 0 obj\n<</Type/Catalog>>\nendobj\ntrailer<</Root 1 0 R>>\n%%EOF\n",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "HTML": b"<html><script>alert(1)</script></html>",
    "XML": b"<!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]><a>&b;</a>",
    "pickle": b"\x80\x02" + PICKLED, "pickle of protocol 0": PICKLED, "zip": archive(),
    "gzip": b"\x1f\x8b\x08\0\0\0\0\0\0\x03", "parquet": parquet(), "half a parquet": b"PAR1 and then nothing",
    "arrow": b"ARROW1\0\0" + b"\xff" * 64, "numpy": b"\x93NUMPY\x01\0v\0{'descr': '|O', 'shape': (1,)}",
    "ELF": b"\x7fELF" + bytes(60),
    "script": f"#!/bin/sh\nmkdir {MARK}\n".encode(), "random": bytes(range(256)) * 16,
}
HEADERS = {  # headers of safetensors
    "huge": struct.pack("<Q", 2**63) + b"{}", "2 GB": struct.pack("<Q", 2**31) + b"{}",
    "of no JSON": struct.pack("<Q", 4) + b"nope",
    "of a list": weights([]), "deep": struct.pack("<Q", 100_000) + b"[" * 100_000, "half": struct.pack("<Q", 2),
    "lying shape": weights({"a": TENSOR | {"shape": [2**40]}}, bytes(4)),
    "negative shape": weights({"a": TENSOR | {"shape": [-1]}}, bytes(4)),
    "overlap": weights({"a": TENSOR, "b": TENSOR}, bytes(4)),
    "outside": weights({"a": TENSOR | {"data_offsets": [0, 400]}}, bytes(4)),
    "unknown type": weights({"a": TENSOR | {"dtype": "OBJECT"}}, bytes(4)),
    "NaN": weights({"a": TENSOR}, struct.pack("<f", float("nan"))),
    "infinite": weights({"a": TENSOR}, struct.pack("<f", float("inf"))),
    "whole numbers": weights({"a": TENSOR | {"dtype": "I32"}}, bytes(4)),
    "booleans": weights({"a": TENSOR | {"dtype": "BOOL", "data_offsets": [0, 1]}}, bytes(1)),
    "a foreign name": weights({"../../evil\n": TENSOR}, bytes(4)), "no tensor": weights({}),
    "notes that are no JSON": weights({"__metadata__": {"about": "[" * 50_000}, "a": TENSOR}, bytes(4)),
}
CONTENTS = {"text": TEXTS, "values": VALUES, "depth": DEPTHS, "formats": FORMATS, "headers": HEADERS}

KINDS = {  # what stands there instead of a file
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a device without end": lambda path: path.symlink_to("/dev/zero"),
    "a terminal": lambda path: path.symlink_to("/dev/tty"),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to memory": lambda path: path.symlink_to("/proc/self/mem"),
    "a link to a folder": lambda path: path.symlink_to("/proc"),
}
