"""Define the errors of this package. A message names what was given, what was expected and what to do."""

LONGEST = 2000  # characters of a message; what is quoted in it may be of any length


class AdaAttnError(Exception):
    """Base of all errors of this package. Its text is one line, whatever names and messages it quotes."""

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) > LONGEST:
            text = f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"
        return "".join(x if x.isprintable() else _visible(x) for x in text)


class ConfigError(AdaAttnError, ValueError):
    """An option has a value that cannot work."""


class ShapeError(AdaAttnError, ValueError):
    """A tensor has a shape that the call does not take."""


class DtypeError(AdaAttnError, TypeError):
    """An argument has a type that the call does not take."""


class DeviceError(AdaAttnError, RuntimeError):
    """Tensors that belong together are on different devices."""


class CheckpointError(AdaAttnError):
    """A file could not be read or written as a model."""


class ExportError(AdaAttnError):
    """A model could not be captured or lowered."""


class TargetError(ExportError):
    """One target failed; the artifacts of the others are kept."""


def _visible(character: str) -> str:
    """Return a line break as a space, and a character that a terminal or a decoder acts on as an escape sequence."""
    return " " if character.isspace() else character.encode("unicode_escape").decode()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def last_line(error: BaseException) -> str:
    """Return the last line of an error's message, where ONNX Runtime says what is wrong, or the name of its type."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
