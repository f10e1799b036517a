#!/usr/bin/env python3
"""Derives the oracle's reference data from what real OpenStack said. Run by hand, when a source changes:

    tests/oracle/generate.py RECORDINGS OPENAPI      (in a virtualenv with tempest 47 and PyYAML)

RECORDINGS is the folder of *.jsonl exchanges with a real cloud, OPENAPI the folder data/ of the
crate openstack_types. `--only recorded` makes
what comes of the recordings (that needs nothing but Python), `--only openapi` what comes of the documents
(that needs PyYAML and jsonschema); `--into FOLDER` writes elsewhere. Writes, beside itself:

    data/recorded/SERVICE.json   the shapes of the recorded bodies: fields, types, which may be absent
    data/tempest.json            the response schemas of Tempest's compute clients, by microversion
                                 (Tempest is under Apache-2.0; its notice stands in data/NOTICE)
    data/openapi/SERVICE.json    the OpenAPI response schemas that every real answer passes
    data/examples.json           some of the exchanges, for the oracle's own tests
"""
import argparse
import collections
import json
import pathlib
import re
import sys

HERE = pathlib.Path(__file__).resolve().parent
SERVICES = ["compute", "identity", "image", "volume", "network", "object-store"]
# Objects whose keys are data: any key may stand there.
MAPS = {"metadata", "extra_specs", "addresses", "properties", "options", "os:scheduler_hints",
        "flavor_extra_specs", "patternProperties", "definitions", "meta", "hosts", "services of a host"}
VOLATILE = {"content-length", "date", "connection", "server", "keep-alive", "transfer-encoding",
            "location", "etag", "openstack-image-store-ids", "openstack-image-import-methods", "link", "content-disposition", "access-control-allow-origin"}
TIME = [("time_z", r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"),
        ("time_us_z", r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z"),
        ("time_us", r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+")]


def minor(exchange):
    """The minor part of the microversion that the answer was given in; 0 where there are none."""
    said = exchange.get("response_headers", {})
    version = said.get("openstack-api-version") or ""
    found = re.search(r"(?:compute|volume) \d+\.(\d+)", version)
    return int(found.group(1)) if found else 0


def action(exchange):
    body = exchange.get("request_body")
    if exchange["path"].split("?")[0].endswith("/action") and isinstance(body, dict) and body:
        return next(iter(body))
    return None


def form(text):
    for name, pattern in TIME:
        if re.fullmatch(pattern, text):
            return name
    if re.fullmatch(r"[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}", text):
        return "uuid"
    if re.fullmatch(r"[0-9a-f]{32}", text):
        return "hex32"
    if re.match(r"(https?|wss?)://", text):
        return "url"
    return "text"


# Headers whose values say something, and the texts in them that are of that set-up or that moment alone.
VALUES = {"content-type", "vary", "x-openstack-request-id", "x-compute-request-id", "location",
          "openstack-api-version", "x-openstack-nova-api-version", "www-authenticate", "content-md5",
          "content-range"}


def header_form(name, value):
    """A header's value with what varies replaced by its kind."""
    value = re.sub(r"[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}", "{uuid}", value)
    value = re.sub(r"\b[0-9a-f]{32}\b", "{hex32}", value)
    if name == "location":
        # Below the service, whatever address it has.
        path = re.sub(r"^https?://[^/]*", "", value)
        return "/".join("{name}" if part.startswith("tempest-") else part for part in path.split("/"))
    if name in ("openstack-api-version", "x-openstack-nova-api-version"):
        return re.sub(r"2\.\d+$", "2.{n}", value)
    if name == "content-range":
        return re.sub(r"\d+", "{n}", value)
    return re.sub(r"https?://[^\"]*", "{url}", value)


class Shape:
    """What was seen at one place of a body."""
    def __init__(self):
        self.types, self.forms, self.fields = set(), set(), {}
        self.objects, self.seen, self.items, self.map, self.open = 0, collections.Counter(), None, None, False

    def see(self, value, name=""):
        if isinstance(value, dict):
            if any(key in value for key in ("$binary", "$truncated_body_bytes")) or set(value) == {"$ref"}:
                self.open = True
                value = {k: v for k, v in value.items() if not k.startswith("$")}
                if not value:
                    return
            self.types.add("object")
            if name in MAPS:
                self.map = self.map or Shape()
                for item in value.values():
                    # Of a zone's hosts, the keys of each are its services.
                    self.map.see(item, "services of a host" if name == "hosts" else "")
                return
            self.objects += 1
            for key, item in value.items():
                # Of that set-up's several image stores; not to be copied.
                if key.startswith("os_glance_") or key in ("stores", "locations", "direct_url"):
                    self.open = True
                    continue
                if key.startswith("$truncated"):
                    self.open = True
                    continue
                self.seen[key] += 1
                self.fields.setdefault(key, Shape()).see(item, key)
        elif isinstance(value, list):
            self.types.add("array")
            for item in value:
                if isinstance(item, str) and item.startswith("$truncated"):
                    continue
                self.items = self.items or Shape()
                self.items.see(item)
        elif isinstance(value, str):
            self.types.add("string")
            self.forms.add(form(value))
        elif value is None:
            self.types.add("null")
        else:
            self.types.add({bool: "boolean", int: "integer", float: "number"}[type(value)])

    def optional(self, path, into):
        """Fields that are sometimes absent though nothing else differs."""
        for key, shape in self.fields.items():
            if self.seen[key] < self.objects:
                into.add(f"{path}.{key}")
            shape.optional(f"{path}.{key}", into)
        if self.items:
            self.items.optional(path + "[]", into)
        if self.map:
            self.map.optional(path + ".*", into)

    def dump(self):
        out = {"types": sorted(self.types)}
        if self.forms and self.forms != {"text"}:
            out["forms"] = sorted(self.forms)
        if self.fields or (self.objects and self.map is None):
            out["fields"] = {key: self.fields[key].dump() for key in sorted(self.fields)}
        if self.map is not None:
            out["map"] = self.map.dump()
        if self.items is not None:
            out["items"] = self.items.dump()
        if self.open:
            out["open"] = True
        return out


def exchanges(folder, service):
    for line in open(folder / f"{service}.jsonl"):
        yield json.loads(line)


def image_nulls(folder):
    """The fields of an image that may be null, as the cloud's own schema of it says."""
    for exchange in exchanges(folder, "image"):
        if exchange["path"] == "/v2/schemas/image" and exchange["status"] == 200:
            fields = exchange["response_body"]["properties"]
            return [name for name, field in fields.items() if "null" in field.get("type", [])]
    raise SystemExit("no schema of an image was recorded")


def nullable(shape, names):
    for name in names:
        if name in shape.fields:
            shape.fields[name].types.add("null")


def recorded(folder, service):
    operations, errors = {}, {}
    null = image_nulls(folder) if service == "image" else []
    for exchange in exchanges(folder, service):
        status, body = exchange["status"], exchange.get("response_body")
        path = exchange["path"].split("?")[0]
        key = (exchange["method"], path, action(exchange))
        answers = operations.setdefault(key, {})
        answer = answers.setdefault(status, {"headers": None, "versions": {}, "bodies": set(), "values": {}})
        names = set(exchange.get("response_headers", {})) - VOLATILE
        for name, value in exchange.get("response_headers", {}).items():
            if name in VALUES:
                answer["values"].setdefault(name, set()).add(header_form(name, value))
        answer["headers"] = names if answer["headers"] is None else answer["headers"] & names
        if body is None or body == "":
            answer["bodies"].add("none")
            continue
        if isinstance(body, (dict, list)) and not (isinstance(body, dict) and "$binary" in body):
            answer["bodies"].add("json")
            if status >= 400:
                errors.setdefault(status, Shape()).see(body)
            else:
                shape = answer["versions"].setdefault(minor(exchange), Shape())
                # The body of one extra spec is the spec itself: its key is data.
                shape.see(body, "extra_specs" if path.endswith("/os-extra_specs/{name}") else "")
                if service == "identity":
                    # Users and projects carry what clients gave them, as keystone's `extra`.
                    for name in ("user", "project"):
                        for thing in [shape.fields.get(name), (shape.fields.get(name + "s") or Shape()).items]:
                            if thing:
                                thing.open = True
                                if "extra" in thing.fields:
                                    thing.fields["extra"].open = True
                if service == "image" and path.startswith("/v2/images"):
                    # An image carries its owner's own properties.
                    shape.open = shape.open or "images" not in body and "id" in body
                    for item in [shape.fields.get("images")]:
                        if item and item.items:
                            item.items.open = True
                            nullable(item.items, null)
                    if "id" in body:
                        nullable(shape, null)
        else:
            answer["bodies"].add("text")
    out = []
    for (method, path, act), answers in sorted(operations.items(), key=lambda item: str(item[0])):
        optional = set()
        for answer in answers.values():
            for shape in answer["versions"].values():
                shape.optional("", optional)
        if service == "identity":
            for user in (".user", ".users[]"):
                optional |= {f"{user}.{name}" for name in ("email", "description", "default_project_id", "extra", "extra.email")}
        out.append({
            "method": method, "path": path, "action": act, "optional": sorted(optional),
            "answers": {str(status): {
                "headers": sorted(answer["headers"]), "bodies": sorted(answer["bodies"]),
                "values": {name: sorted(forms) for name, forms in sorted(answer["values"].items())},
                "versions": {str(v): s.dump() for v, s in sorted(answer["versions"].items())},
            } for status, answer in sorted(answers.items())}})
    return {"operations": out, "errors": {str(s): e.dump() for s, e in sorted(errors.items())}}


def amend(key, status, body, version):
    """Where real nova 34 answers otherwise than Tempest 47 says (both are recorded), nova is right.
    Returns the status codes and the schema to hold answers to, or None for no schema."""
    method, path, _ = key
    body = json.loads(json.dumps(body))
    # From 2.88 a hypervisor has no vcpus, memory and the like; Tempest has no schema for that.
    if path.startswith("/v2.1/os-hypervisors") and version >= 88:
        return None
    if path == "/v2.1/os-server-external-events":
        status = status + [207]
    # A page that is not the last one links to the next.
    for name in ("keypairs", "migrations"):
        if method == "GET" and body and name in body.get("properties", {}) and path == f"/v2.1/os-{name}":
            body["properties"][name + "_links"] = {"type": "array", "items": {"type": "object"}}
    for name in ("server", "servers"):
        server = (body or {}).get("properties", {}).get(name, {})
        server = server.get("items", server).get("properties", {})
        # `group` is a list there.
        if "scheduler_hints" in server:
            server["scheduler_hints"] = {"type": "object"}
    console = (body or {}).get("properties", {}).get("remote_console", {}).get("properties", {})
    for name, value in (("protocol", "mks"), ("type", "webmks")):
        if value not in console.get(name, {}).get("enum", [value]):
            console[name]["enum"].append(value)
    return status, body


def tempest():
    """Calls every method of every compute client with a stand-in for the network, and notes which
    schema it would hold the answer to, for each microversion."""
    import importlib
    import inspect
    import pkgutil
    from tempest.lib.common import rest_client
    from tempest.lib.services import compute
    from tempest.lib.services.compute import base_compute_client as base

    seen = {}

    class Noted(Exception):
        pass

    class Response(dict):
        status = 200

    request = {}

    def send(self, method, url, extra_headers=False, headers=None, body=None, chunked=False):
        request.update(method=method, url=url, body=body)
        return Response(), "{}"

    def note(cls, schema, resp, body):
        url = request["url"].split("?")[0].strip("/")
        parts = [re.sub(r"^@(.*)@$", r"{\1}", part) for part in url.split("/")]
        body = json.loads(request["body"]) if request["body"] else None
        act = next(iter(body)) if url.endswith("/action") and isinstance(body, dict) and body else None
        key = (request["method"], "/v2.1/" + "/".join(parts), act)
        seen.setdefault(key, {})[note.version] = schema
        raise Noted()

    base.BaseComputeClient.request = send
    rest_client.RestClient.validate_response = classmethod(note)
    clients = []
    for module in pkgutil.iter_modules(compute.__path__):
        loaded = importlib.import_module(f"tempest.lib.services.compute.{module.name}")
        clients += [c for _, c in inspect.getmembers(loaded, inspect.isclass)
                    if issubclass(c, base.BaseComputeClient) and c is not base.BaseComputeClient]
    kwargs = [{}, {"type": "@x@"}, {"flavor": "@x@", "name": "@x@"}, {"detail": True}, {"host": "@x@"}]
    for version in range(1, 105):
        base.COMPUTE_MICROVERSION = None if version == 1 else f"2.{version}"
        note.version = version
        for client in clients:
            made = client.__new__(client)
            made.service, made.region = "compute", None
            made.enable_instance_password, made.ssh_key_type = True, "rsa"
            for name, method in inspect.getmembers(client, inspect.isfunction):
                if name.startswith(("_", "is_", "wait", "get_", "request", "expected")) and not name.startswith("get_"):
                    continue
                try:
                    parameters = list(inspect.signature(method).parameters.values())[1:]
                except ValueError:
                    continue
                if name in vars(rest_client.RestClient) or name in ("action", "get_schema", "get_headers"):
                    continue
                arguments = {p.name: f"@{p.name}@" for p in parameters
                             if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
                detail = [{}] + ([{"detail": True}, {"details": True}, {"extend_schema": True}]
                                 if any(p.name in ("detail", "details") for p in parameters) else [])
                for more in [d for d in detail if all(k in [p.name for p in parameters] for k in d)]:
                    for extra in kwargs if any(p.kind is p.VAR_KEYWORD for p in parameters) else [{}]:
                        try:
                            method(made, **arguments, **more, **{k: v for k, v in extra.items() if k not in arguments and k not in more})
                        except Noted:
                            break
                        except Exception:
                            continue
    schemas, out = [], []

    def number(schema):
        if schema not in schemas:
            schemas.append(schema)
        return schemas.index(schema)

    for (method, path, act), by_version in sorted(seen.items(), key=str):
        ranges = []
        for version in sorted(by_version):
            schema = by_version[version]
            amended = amend((method, path, act), schema["status_code"], schema.get("response_body"), version)
            if amended is None:
                continue
            status, body = amended
            entry = {"status": status, "body": None if body is None else number(body)}
            if ranges and ranges[-1]["to"] == version - 1 and {k: ranges[-1][k] for k in entry} == entry:
                ranges[-1]["to"] = version
            else:
                ranges.append({"from": version, "to": version, **entry})
        out.append({"method": method, "path": path, "action": act, "ranges": ranges})
    return {"operations": out, "schemas": schemas}


OPENAPI = {"compute": ("compute/v2.104.yaml", ""), "identity": ("identity/v3.14.yaml", ""),
           "image": ("image/v2.16.yaml", "")}


def openapi(recordings, folder, service):
    """The response schemas that every real answer of their operation passes, and that would refuse a
    spoilt one."""
    import jsonschema
    import yaml
    name, _ = OPENAPI[service]

    class Yaml12(yaml.CSafeLoader):
        """Of YAML 1.2: `no`, `off` and a date are texts, unlike in PyYAML."""

    Yaml12.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if not tag.endswith((":bool", ":timestamp"))]
        for first, known in yaml.CSafeLoader.yaml_implicit_resolvers.items()}
    Yaml12.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:true|false)$"), list("tf"))
    document = yaml.load(open(folder / name), Loader=Yaml12)
    real = {}
    for exchange in exchanges(recordings, service):
        body = exchange.get("response_body")
        if isinstance(body, dict) and "$truncated" not in json.dumps(body) and "$ref" not in body:
            key = (exchange["method"], re.sub(r"\{[^}]*\}", "{}", exchange["path"].split("?")[0]), str(exchange["status"]))
            real.setdefault(key, []).append((action(exchange), body))
    out, needed = [], set()

    def refs(node):
        if isinstance(node, dict):
            target = node.get("$ref")
            if isinstance(target, str) and target.startswith("#/components/") and target not in needed:
                needed.add(target)
                refs(resolve(target))
            for value in node.values():
                refs(value)
        elif isinstance(node, list):
            for value in node:
                refs(value)

    def resolve(target):
        node = document
        for part in target[2:].split("/"):
            node = node[part]
        return node

    for path, item in document["paths"].items():
        for method, operation in item.items():
            if method not in ("get", "post", "put", "patch", "delete"):
                continue
            for status, response in operation.get("responses", {}).items():
                if not str(status).isdigit():
                    continue
                if "$ref" in response:
                    response = resolve(response["$ref"])
                schema = response.get("content", {}).get("application/json", {}).get("schema")
                entry = {"method": method.upper(), "path": path, "status": int(status), "schema": None}
                out.append(entry)
                bodies = real.get((method.upper(), re.sub(r"\{[^}]*\}", "{}", path), str(status)))
                if not schema or not bodies:
                    continue
                validator = jsonschema.Draft202012Validator({**schema, "components": document["components"]})
                if not all(validator.is_valid(body) for _, body in bodies):
                    continue
                spoilt = [{}] + [{key: 12345.5 for key in body} for _, body in bodies]
                if all(validator.is_valid(body) for body in spoilt):
                    continue
                refs(schema)
                entry["schema"] = schema
    components = {}
    for target in sorted(needed):
        _, section, name = target[2:].split("/")
        components.setdefault(section, {})[name] = resolve(target)
    # Operations without a usable schema stay, so that no other one is taken for theirs.
    usable = sum(entry["schema"] is not None for entry in out)
    return {"document": OPENAPI[service][0], "usable": usable, "operations": out, "components": components}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, separators=(",", ":"), sort_keys=False) + "\n")
    print(path, path.stat().st_size, file=sys.stderr)


def examples(folder):
    """A few whole exchanges of each kind of answer, for the oracle's own tests."""
    out, seen = [], collections.Counter()
    for service in OPENAPI:
        for exchange in exchanges(folder, service):
            body = exchange.get("response_body")
            text = json.dumps(body)
            kind = (service, exchange["method"], exchange["path"].split("?")[0], action(exchange), exchange["status"])
            if "$" in text or len(text) > 4000 or seen[kind] or exchange["status"] >= 500:
                continue
            if not re.search(r"/(servers|flavors|os-keypairs|limits|os-services|images|users|projects|tokens)\b", exchange["path"]):
                continue
            seen[kind] += 1
            out.append({"method": exchange["method"], "path": f"/{service}" + exchange["path"],
                        "request": {action(exchange): None} if action(exchange) else None,
                        "status": exchange["status"], "headers": exchange.get("response_headers", {}), "body": body})
    return out


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("recordings", type=pathlib.Path)
    arguments.add_argument("openapi", type=pathlib.Path, nargs="?")
    arguments.add_argument("--into", type=pathlib.Path, default=HERE / "data")
    arguments.add_argument("--only", choices=["recorded", "openapi"])
    given = arguments.parse_args()
    for service in ("compute", "identity", "image"):
        if given.only != "openapi":
            write(given.into / "recorded" / f"{service}.json", recorded(given.recordings, service))
        if given.only != "recorded":
            write(given.into / "openapi" / f"{service}.json", openapi(given.recordings, given.openapi, service))
    if given.only != "openapi":
        write(given.into / "examples.json", examples(given.recordings))
    if given.only is None:
        write(given.into / "tempest.json", tempest())


main()
