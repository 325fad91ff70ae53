"""Every kind of verifiable instruction with an answer that follows it and one that does not."""

from __future__ import annotations

import pytest

from evaluation.instructions.checks import CHECKS

CASES = {
    "keywords:existence": ({"keywords": ["red", "Blue"]}, "Red and blue.", "Only red."),
    "keywords:frequency": ({"keyword": "go", "frequency": 2, "relation": "at least"}, "Go, go!", "Go!"),
    "keywords:forbidden_words": ({"forbidden_words": ["cat"]}, "A category.", "A Cat."),
    "keywords:letter_frequency": ({"letter": "z", "let_frequency": 2, "let_relation": "at least"}, "Zoo, zoo", "zoo"),
    "length_constraints:number_sentences": (
        {"num_sentences": 3, "relation": "less than"},
        "One 3.5 here. Two?",
        "One. Two! And a third",
    ),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
    "length_constraints:number_words": ({"num_words": 3, "relation": "at least"}, "don't stop now", "well-known fact"),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "however"},
        "Yes.\n\n'However, no.",
        "However.\n\nYes.",
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[name] at [place]", "[name]"),
    "detectable_content:postscript": ({"postscript_marker": "P.P.S"}, "Bye.\nP. P. S. More.", "Bye.\nP.S. More."),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* one\n - two\n**three**", "* one\n* two\n* three"),
    "detectable_format:constrained_response": ({}, "Well: My answer is maybe.", "Maybe."),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, "*a* and **b**", "*a* and * *"),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\na\nSection 2\nb",
        "Section 1\na\nSection two",
    ),
    "detectable_format:json_format": ({}, '```json\n{"a": [1]}\n```', '{"a": 1'),
    "detectable_format:title": ({}, "<<A title>>\nText", "<< >>\nText"),
    "combination:two_responses": ({}, "a ****** b", "a ****** a"),
    "combination:repeat_prompt": ({"prompt_to_repeat": "How many?"}, "how many? Eight.", "Eight."),
    "startend:end_checker": ({"end_phrase": "The end."}, 'So it was. "The END."', "The end. Or not."),
    "startend:quotation": ({}, ' "Good night." ', '"'),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "less than"},
        "STOP it now",
        "STOP IT now",
    ),
    "change_case:english_capital": ({}, "ALL OF IT!", "All OF IT!"),
    "change_case:english_lowercase": ({}, "all of it!", "All of it!"),
    "punctuation:no_comma": ({}, "one; two", "one, two"),
}


@pytest.mark.parametrize("name", CHECKS)
def test_an_instruction_is_followed_or_not(name):
    options, follows, does_not = CASES[name]
    assert CHECKS[name](follows, **options)
    assert not CHECKS[name](does_not, **options)
