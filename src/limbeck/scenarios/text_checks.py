"""Preflight of recipes over texts: whether their parts go together, asked before any weight is read."""

from __future__ import annotations

from typing import Any

from limbeck.data.texts import Reading
from limbeck.errors import ConfigError
from limbeck.scenarios.fit_together import has_teacher, named
from limbeck.scenarios.written import Writing


def check_texts(recipe: Any) -> None:
    """Raise unless data and networks are made for text."""
    if not isinstance(getattr(recipe.data, "reading", None), Reading):
        raise ConfigError(
            f"data is {type(recipe.data).__name__}, which holds no texts: take python_texts, text_files, "
            "jsonl or hub_texts, or another scenario"
        )
    for who in ("student", "teacher"):
        choice = getattr(recipe, who)
        if (who == "student" or has_teacher(recipe)) and not choice.reads_text():
            raise ConfigError(
                f"the {who} is {type(choice).__name__}, which is no language model: take llama or causal_lm"
                + (", or trained with one as its network" if who == "teacher" else "")
            )


def check_privacy(recipe: Any) -> None:
    """Raise where an objective reads how private tokens are, but the data does not say."""
    for name, objective in named(recipe).items():
        if getattr(objective, "reads_privacy", False) and not recipe.data.reading.private:
            raise ConfigError(
                f"objective {name} reads how private each token is, but the data does not say: set "
                "data.private, to [digits, email] for example"
            )


def check_kept(recipe: Any, classes: int) -> None:
    """Raise where a teacher of whom the top tokens alone are kept is asked for more than that.

    Args:
        recipe: its engine and its teacher say how many are kept.
        classes: how many tokens there are.
    """
    kept = [count for count in (recipe.engine.cache_top_k, recipe.teacher.tells()) if count is not None]
    if not kept or min(kept) >= classes:
        return
    served = "" if recipe.teacher.tells() is None else " and the teacher to one that is not served"
    for name, objective in named(recipe).items():
        heat, needs = getattr(objective, "temperature", 1), objective.needs()
        if needs.tokens is None or min(needs.tokens, classes) > min(kept):
            wanted = "all" if needs.tokens is None else str(needs.tokens)
            raise ConfigError(
                f"objective {name} reads {wanted} of the teacher's tokens, but the {min(kept)} most probable "
                f"alone are kept: set engine.cache_top_k to null{served}"
            )
        if heat != 1 and not needs.logits:
            raise ConfigError(
                f"objective.{name}.temperature is {heat}, but the teacher's top tokens are known at 1 alone: "
                "set it to 1, or engine.cache_top_k to null and the teacher to one that is not served"
            )


def check_selector(recipe: Any) -> None:
    """Raise where a selector compares with a teacher that is not there, or does not tell enough."""
    name, told = name_of(recipe.selector), recipe.teacher.tells()
    if recipe.selector.asks and not has_teacher(recipe):
        raise ConfigError(f"selector {name} compares with a teacher but teacher is none: name one")
    if recipe.selector.asks_all and told is not None:
        raise ConfigError(
            f"selector {name} reads all that the teacher says, but it is served and tells of its {told} most "
            "probable tokens alone: take a teacher that is not served"
        )


def check_writing(writing: Writing | None, recipe: Any) -> None:
    """Raise where texts cannot be written, or are not, though an objective learns from them."""
    taught = writing is not None and (writing.by == "teacher" or writing.teacher_mix > 0)
    if taught and not has_teacher(recipe):
        raise ConfigError(
            "scenario.writing has the teacher write but teacher is none: name one, or let the student write"
        )
    if taught and recipe.teacher.tells() is not None:
        raise ConfigError(
            "scenario.writing has the teacher write but it is served, and is asked for probabilities alone: "
            "let the student write"
        )
    if writing is not None and writing.buffer is not None:
        capacity, size = writing.buffer.capacity, recipe.scenario.batch_size
        if capacity < size:
            raise ConfigError(
                f"scenario.writing.buffer.capacity is {capacity} but a batch has {size} rows: allowed are "
                f"values of at least {size}"
            )
    for name, objective in named(recipe).items():
        if getattr(objective, "on_policy", False) and (writing is None or writing.by == "teacher"):
            raise ConfigError(
                f"objective {name} learns from texts that the student writes, but scenario.writing names "
                "none: set it to {by: student, share: 1}"
            )
        if getattr(objective, "reads_privacy", False) and writing is not None:
            raise ConfigError(
                f"objective {name} reads how private each token is, which is known of the data's texts "
                "alone: set scenario.writing to null"
            )


def check_alignment(recipe: Any, own: int, other: Any, writing: Writing | None) -> None:
    """Raise where teacher and student read different tokens, and a part compares them one by one.

    Args:
        recipe: its objectives and selector are asked.
        own: tokens of the student's tokenizer.
        other: the teacher's tokenizer; None = it is the student's.
        writing: what part of the texts a network writes.
    """
    if other is None:
        return
    differ = f"teacher and student read different tokens ({len(other)} and {own})"
    deaf = [
        name
        for name, objective in named(recipe).items()
        if (objective.needs().teacher_logits or objective.needs().teacher)
        and not getattr(objective, "aligns", False)
    ]
    if deaf or not any(getattr(objective, "aligns", False) for objective in recipe.objective):
        which = f", which objective {deaf[0]} compares" if deaf else ""
        raise ConfigError(
            f"{differ}{which}: take a student with the teacher's tokenizer, or the objective uld alone, "
            "which aligns them"
        )
    if recipe.selector.asks:
        raise ConfigError(
            f"{differ}, which selector {name_of(recipe.selector)} compares: take a student with the "
            "teacher's tokenizer, or the selector all"
        )
    if writing is not None:
        raise ConfigError(
            f"{differ}, but what a network writes is read in its own alone: take a student with the "
            "teacher's tokenizer, or set scenario.writing to null"
        )


def name_of(choice: Any) -> str:
    """The name that a choice goes by in a recipe."""
    return type(choice).__module__.rpartition(".")[2]
