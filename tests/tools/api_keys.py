"""Makes an API key of a service, as a client would. Standard library only."""

import json
import urllib.request

PASSWORD = "Str0ng-enough-9x"
ALL_SCOPES = ("chat", "embeddings", "read", "write")


def post(url, body, token=None):
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def make_key(service, name="clients", scopes=ALL_SCOPES):
    """Registers a user of that name with an API key, and returns the key."""
    account = {"username": name, "email": f"{name}@example.org", "password": PASSWORD}
    post(f"{service.url}/api/auth/register/", account)
    access = post(f"{service.url}/api/auth/login/", account)["access"]
    return post(f"{service.url}/api/keys", {"name": name, "scopes": list(scopes)}, access)["key"]
