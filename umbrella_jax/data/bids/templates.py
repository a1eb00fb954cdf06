"""The wording of questions and answers, and what it may contain."""

from pathlib import Path

from umbrella_jax.data.placeholders import text_faults
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
    if key.endswith("answer"):
        return text_faults(text, ["target", "label"], needed="label")
    return text_faults(text, ["target"])  # a question must not give the answer away
