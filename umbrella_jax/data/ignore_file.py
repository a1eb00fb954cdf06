"""Apply the patterns of a `.bidsignore` file, which follow the rules of `.gitignore`."""

import re
from collections.abc import Iterable


class IgnoreFile:
    """The rules of an ignore file (https://git-scm.com/docs/gitignore).

    The last matching pattern wins. A pattern after `!` includes paths again, except below an excluded folder.

    Raises:
        ValueError: a faulty pattern, such as `[z-a]`.
    """

    def __init__(self, lines: Iterable[str]):
        self._rules: list[tuple[re.Pattern[str], bool, bool]] = []  # pattern, matches folders only, excludes
        for line in lines:
            text = re.sub(r"(?<!\\)\s+$", "", line)
            if not text or text.startswith("#"):
                continue
            excludes = not text.startswith("!")
            text = text.removeprefix("!")
            folder = text.endswith("/")
            text = text.rstrip("/")
            if not text:
                continue
            anchored = "/" in text
            pattern = _regex(text.removeprefix("/"))
            try:
                compiled = re.compile(pattern if anchored else f"(?:.*/)?{pattern}")
            except re.error as error:
                raise ValueError(f"{line}: {error}") from None
            self._rules.append((compiled, folder, excludes))

    def excludes(self, path: str) -> bool:
        """Return whether a file is excluded; `path` is relative to the ignore file's folder, with `/` as separator."""
        parts = path.split("/") if self._rules else []
        return any(self._matches("/".join(parts[:end]), end < len(parts)) for end in range(1, len(parts) + 1))

    def _matches(self, path: str, is_folder: bool) -> bool:
        hits = [
            excludes for pattern, folder, excludes in self._rules if folder <= is_folder and pattern.fullmatch(path)
        ]
        return bool(hits) and hits[-1]


def _regex(glob: str) -> str:
    """Translate a pattern to a regular expression: `*` and `?` stop at `/`, `**` does not."""
    tokens = re.compile(r"(\*\*/)|(/\*\*$)|(\*+)|(\?)|\[([!^]?)(\]?[^\]]*)\]|\\(.)|(.)", re.DOTALL)
    out = ""
    for match in tokens.finditer(glob):
        folders, below, stars, one, negated, letters, escaped, plain = match.groups()
        at_start = match.start() == 0 or glob[match.start() - 1] == "/"
        if folders and at_start:
            out += "(?:.*/)?"
        elif below:
            out += "/.*"
        elif stars == "**" and match.group() == glob:
            out += ".*"
        elif folders:
            out += "[^/]*/"
        elif stars:
            out += "[^/]*"
        elif one:
            out += "[^/]"
        elif letters:
            members = letters.replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]").replace("^", "\\^")
            out += f"[^/{members}]" if negated else f"[{members}]"
        else:
            out += re.escape(escaped or plain)
    return out
