"""The file of a multipart form (RFC 7578), written out as it arrives.

The framework's own form parser spools into the system's temporary folder, which may be memory or small, and
offers no other.
"""

from typing import BinaryIO, Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from rushes.errors import InvalidInput, MalformedRequest

NAMES: Final = (b"file", b"content")
"""What the file's part may be called."""
_MOST_FIELDS: Final = 16
_HEAD_BYTES: Final = 16 * 1024


class FileForm:
    """A form whose one file goes to ``out``; other fields are read over. Raises MalformedRequest.

    Not for the event loop: :meth:`write` parses, and writes to ``out``.
    """

    def __init__(self, content_type: str, out: BinaryIO) -> None:
        boundary = parse_options_header(content_type)[1].get(b"boundary")
        if not boundary:
            raise _unreadable("its Content-Type names no boundary")
        self._out = out
        self._name: str | None = None
        self._fields = self._files = self._head = 0
        self._header = self._value = self._disposition = b""
        self._taking = self._ended = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._on_part_begin,
                    "on_header_field": self._on_header_field,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_part_data": self._on_part_data,
                    "on_end": self._on_end,
                },
            )
        except FormParserError as error:
            raise _unreadable(str(error)) from None

    def write(self, data: bytes) -> None:
        """The form's next bytes."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise _unreadable(str(error)) from None

    def finish(self) -> str:
        """The file's name, once all has been written. Raises InvalidInput where there was no file."""
        if not self._ended:
            raise _unreadable("it ends before its last boundary")
        if self._name is None:
            missing = [{"loc": ["file"], "msg": "file is required: a file part of the form", "type": "missing"}]
            raise InvalidInput("The form needs a file part named file.", detail=missing)
        return self._name

    # -- what the parser finds --------------------------------------------------------------------------
    def _on_part_begin(self) -> None:
        self._head = 0
        self._disposition = b""
        self._taking = False

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._value += data[start:end]

    def _count(self, size: int) -> None:
        self._head += size
        if self._head > _HEAD_BYTES:
            raise _unreadable(f"a part's headers have more than {_HEAD_BYTES} bytes")

    def _on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _on_headers_finished(self) -> None:
        options = parse_options_header(self._disposition)[1]
        if b"name" not in options:
            raise _unreadable("a part has no name")
        if b"filename" not in options:
            self._fields += 1
            if self._fields > _MOST_FIELDS:
                raise _unreadable(f"it has more than {_MOST_FIELDS} fields")
            return
        self._files += 1
        if self._files > 1:
            raise _unreadable("it has more than one file")
        if options[b"name"] in NAMES:
            self._taking = True
            self._name = options[b"filename"].decode("utf-8", "replace")

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._taking:
            self._out.write(memoryview(data)[start:end])

    def _on_end(self) -> None:
        self._ended = True


def _unreadable(why: str) -> MalformedRequest:
    return MalformedRequest(f"This multipart form cannot be read: {why}.")
