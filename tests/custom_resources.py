"""What the manifests' custom resources may say, as JSON schemas written by hand from the published definitions.

Only fields that the manifests have or may soon have: one that is not here is a mistake, or to be looked up and added.
Sources: Istio's ``networking.istio.io/v1`` (1.24 and newer) and Kueue's ``kueue.x-k8s.io/v1beta2`` (0.15 and newer).
"""

from typing import Any

import jsonschema

Schema = dict[str, Any]
TEXT: Schema = {"type": "string", "minLength": 1}
LABELS: Schema = {"type": "object", "additionalProperties": TEXT}
QUANTITY: Schema = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": r"^\d+(m|[kMGTP]i?)?$"}]}


def fields(required: str = "", **properties: Schema) -> Schema:
    """Return the schema of an object that has these fields and no others."""
    return {"type": "object", "properties": properties, "required": required.split(), "additionalProperties": False}


def some(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1}


def custom(kind: str, api: str, spec: Schema) -> Schema:
    """Return the schema of a custom resource."""
    metadata = fields("name labels", name=TEXT, namespace=TEXT, labels=LABELS, annotations=LABELS)
    return fields(
        "apiVersion kind metadata spec", apiVersion={"const": api}, kind={"const": kind}, metadata=metadata, spec=spec
    )


ISTIO, KUEUE = "networking.istio.io/v1", "kueue.x-k8s.io/v1beta2"
MATCH = fields(exact=TEXT, prefix=TEXT, regex=TEXT) | {"minProperties": 1, "maxProperties": 1}
PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
ROUTE = fields(
    name=TEXT,
    match=some(fields(uri=MATCH, method=MATCH, authority=MATCH)),
    redirect=fields(uri=TEXT, authority=TEXT, scheme=TEXT, redirectCode={"enum": [301, 302, 303, 307, 308]}),
    rewrite=fields(uri=TEXT, authority=TEXT),
    route=some(fields("destination", destination=fields("host", host=TEXT, subset=TEXT, port=fields(number=PORT)))),
    timeout={"type": "string", "pattern": r"^\d+(ms|s|m|h)$"},
) | {"oneOf": [{"required": ["route"]}, {"required": ["redirect"]}]}
TOLERATION = fields(
    key=TEXT,
    operator={"enum": ["Exists", "Equal"]},
    value=TEXT,
    effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
)
QUOTA = fields("name nominalQuota", name=TEXT, nominalQuota=QUANTITY)
SCHEMAS = {
    schema["properties"]["apiVersion"]["const"] + "/" + schema["properties"]["kind"]["const"]: schema
    for schema in (
        custom("VirtualService", ISTIO, fields("hosts http", hosts=some(TEXT), gateways=some(TEXT), http=some(ROUTE))),
        custom("ResourceFlavor", KUEUE, fields(nodeLabels=LABELS, tolerations=some(TOLERATION))),
        custom(
            "ClusterQueue",
            KUEUE,
            fields(
                "namespaceSelector resourceGroups",
                # Without one no namespace may use the queue.
                namespaceSelector=fields("matchLabels", matchLabels=LABELS),
                queueingStrategy={"enum": ["StrictFIFO", "BestEffortFIFO"]},
                resourceGroups=some(
                    fields(
                        "coveredResources flavors",
                        coveredResources=some(TEXT),
                        flavors=some(fields("name resources", name=TEXT, resources=some(QUOTA))),
                    )
                ),
            ),
        ),
        custom("LocalQueue", KUEUE, fields("clusterQueue", clusterQueue=TEXT)),
    )
}


def is_custom(item: dict[str, Any]) -> bool:
    """Return whether an object's schema is one of these."""
    return f"{item['apiVersion']}/{item['kind']}" in SCHEMAS


def validate(item: dict[str, Any]) -> None:
    """Check a custom resource.

    Raises:
        jsonschema.ValidationError: it says what its definition does not know or allow.
    """
    jsonschema.validate(item, SCHEMAS[f"{item['apiVersion']}/{item['kind']}"])
    for group in item["spec"].get("resourceGroups", []):
        for flavor in group["flavors"]:
            if [quota["name"] for quota in flavor["resources"]] != group["coveredResources"]:
                raise jsonschema.ValidationError(f"flavor {flavor['name']}: {group['coveredResources']}, in this order")
