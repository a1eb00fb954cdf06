"""The wording of questions and answers, and what it may contain."""

from pathlib import Path
from string import Formatter

from umbrella_jax.data.conversation import IMAGE_MARKER, TURN_END, TURN_START
from umbrella_jax.errors import ConfigError
from umbrella_jax.io.reading import read_yaml

TEMPLATES: dict[str, dict[str, str]] = {
    "classification": {"question": "What is the {target} of this subject?", "answer": "{label}."},
    "regression": {"question": "What is the {target} of this subject?", "answer": "{label}"},
    "comparison": {
        "reference_question": "This is a reference. What is the {target} of this subject?",
        "reference_answer": "{label}.",
        "question": "Compared with the reference, what is the {target} of this subject?",
        "answer": "{label}.",
    },
}
"""{kind of conversation: {part: default text}}; a template file replaces single texts."""


def read_template(file: str | Path | None) -> dict[str, dict[str, str]]:
    """Read a template file, YAML or JSON, over the defaults.

    Returns:
        A section for each kind in TEMPLATES and, if the file has it, `labels`: {value: text}.

    Raises:
        ConfigError: with every fault of the file.
    """
    texts = {kind: dict(section) for kind, section in TEMPLATES.items()}
    if file is None:
        return texts
    sections, faults = read_yaml(file), []
    if not isinstance(sections, dict):
        raise ConfigError(f"{file}: expected sections {', '.join(TEMPLATES)}, labels")
    for kind, section in sections.items():
        if kind not in (*TEMPLATES, "labels") or not isinstance(section, dict):
            faults.append(f"{file}: {kind}: expected a section, one of {', '.join(TEMPLATES)}, labels")
            continue
        for key, text in section.items():
            if not isinstance(text, str):
                faults.append(f"{file}: {kind}.{key}: expected a string, got {text!r}")
            elif kind != "labels":
                faults += [f"{file}: {kind}.{key}: {fault}" for fault in _text_faults(kind, key, text)]
            texts.setdefault(kind, {})[str(key)] = text
    if faults:
        raise ConfigError(faults)
    return texts


def _text_faults(kind: str, key: str, text: str) -> list[str]:
    if key not in TEMPLATES[kind]:
        return [f"no such text; expected one of {', '.join(TEMPLATES[kind])}"]
    allowed = ["target", "label"] if key.endswith("answer") else ["target"]  # a question must not give the answer away
    try:
        fields = [(field, spec or conversion) for _, field, spec, conversion in Formatter().parse(text)]
    except ValueError as error:
        return [f"{error}; write {{{{ or }}}} for a brace"]
    faults = [
        f"placeholder {name!r}: expected {' or '.join(f'{{{k}}}' for k in allowed)}"
        for name, format_spec in fields
        if name is not None and (name not in allowed or format_spec)
    ]
    if "label" in allowed and not faults and all(name != "label" for name, _ in fields):
        faults.append("expected {label} in it; without it every subject has the same answer")
    return faults + control_token_faults(text)


def control_token_faults(text: str) -> list[str]:
    """Return a fault if a text contains a token that marks a turn or an image."""
    forged = [token for token in (TURN_START, TURN_END, IMAGE_MARKER) if token in text]
    return [f"contains {' and '.join(forged)}, which only the tokenizer may add; take it out"] if forged else []
