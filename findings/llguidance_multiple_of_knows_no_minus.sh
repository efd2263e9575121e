#!/usr/bin/env bash
set -euo pipefail
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/v"
# llguidance 1.6.1: JSON Schema's multipleOf counts negative multiples, too: jsonschema finds -4 right for {"multipleOf": 2}. The
# grammar made of it allows no minus sign, so that such numbers are never written. Where the schema asks for them alone
# ("maximum": -2) a matcher is made without an error and allows no first byte at all.
"$T/v/bin/pip" -q install llguidance==1.6.1 jsonschema==4.26.0
cd "$T" && "$T/v/bin/python" - <<'PY'
import jsonschema
from llguidance import LLMatcher, LLTokenizer

tokenizer = LLTokenizer("byte")


def accepted(schema, text):
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(schema))
    assert not matcher.is_error(), matcher.get_error()
    return matcher.validate_tokens(tokenizer.tokenize_str(text)) == len(text)


plain, multiple = {"type": "integer"}, {"type": "integer", "multipleOf": 2}
below = {"type": "integer", "multipleOf": 2, "maximum": -2}
for schema in (plain, multiple, below):
    jsonschema.validate(-4, schema)
found = [accepted(plain, "-4"), accepted(multiple, "4"), accepted(multiple, "-4"), accepted(below, "-4")]
print(f"-4 as an integer: {found[0]}; 4 as a multiple of 2: {found[1]}; -4: {found[2]}; -4 with a maximum of -2: {found[3]}")
assert found == [True, True, False, False]
starts = [first for first in "-0123456789 " if accepted(below, first)]
print(f"what may come first with a maximum of -2: {starts}")
assert starts == []
PY
