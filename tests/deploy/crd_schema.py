"""KubeRay's CustomResourceDefinitions as strict JSON schemas: what they do not name does not fit."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema

SCHEMAS = Path(__file__).with_name("kuberay-v1.schema.json")


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A structural schema of Kubernetes as JSON schema: unknown keys refused, integers or text where both may stand."""
    made = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    if "properties" in schema:
        made["properties"] = {name: strict(part) for name, part in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            made[key] = strict(schema[key])
    return made


def with_defaults(value: Any, schema: dict[str, Any]) -> Any:
    """What the API server makes of a resource before it checks it: defaults put in."""
    if isinstance(value, dict) and "properties" in schema:
        parts = schema["properties"]
        value = {name: part["default"] for name, part in parts.items() if "default" in part} | value
        return {name: with_defaults(item, parts.get(name, {})) for name, item in value.items()}
    if isinstance(value, list):
        return [with_defaults(item, schema.get("items", {})) for item in value]
    return value


@cache
def definition(kind: str) -> tuple[dict[str, Any], Any]:
    """The v1 schema of a kind and its strict validator."""
    schema = json.loads(SCHEMAS.read_text())[kind]
    return schema, jsonschema.Draft7Validator(strict(schema))


def check(resource: dict[str, Any]) -> None:
    """Check a KubeRay resource.

    Raises:
        jsonschema.ValidationError: It does not fit.
    """
    schema, validator = definition(resource["kind"])
    error = jsonschema.exceptions.best_match(validator.iter_errors(with_defaults(resource, schema)))
    if error is not None:
        raise error
