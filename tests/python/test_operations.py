"""The procedures of docs/OPERATIONS.md, carried out."""

import secrets
import shutil

from conftest import LOGIN, ME, PASSWORD, REFRESH, SOCKET, client, list_prompts, make_user, post_prompt
from running_service import THROTTLES_OFF, Service
from websockets.sync.client import connect

OLD, NEW = secrets.token_hex(32), secrets.token_hex(32)


def test_the_secret_key_is_changed_without_logging_anybody_out():
    with Service(secret_key=OLD, **THROTTLES_OFF) as service, client(service) as http:
        user = make_user(http)
        session = http.post(LOGIN, json={"username": user.username, "password": PASSWORD, "session": True}).cookies["session"]
        folder = shutil.copytree(service.data_dir, service.folder / "kept") if service.stop() == 0 else None

        # First every replica gets the new key to verify with, then to sign with. The old key stays
        # as long as a refresh token is valid.
        steps = [(OLD, NEW), (NEW, OLD)]
        later = None
        for key, fallback in steps:
            with Service(data_dir=folder, secret_key=key, SECRET_KEY_FALLBACKS=fallback, **THROTTLES_OFF) as changed, client(changed) as again:
                assert again.get(ME, headers=user.auth).status_code == 200
                renewed = again.post(REFRESH, json={"refresh": user.refresh})
                assert renewed.status_code == 200
                later = {"Authorization": f"Bearer {renewed.json()['access']}"}
                assert again.get(ME, headers=later).status_code == 200
                # A session cookie is not signed, so it does not depend on the key.
                with connect(f"{changed.ws_url}{SOCKET}", additional_headers={"Cookie": f"session={session}"}, origin=changed.url) as ws:
                    assert "WebSocket connected" in ws.recv(timeout=30)
                assert changed.stop() == 0

        # The fallback is removed: tokens of the new key are valid, tokens of the old key are not.
        with Service(data_dir=folder, secret_key=NEW, **THROTTLES_OFF) as changed, client(changed) as again:
            assert again.get(ME, headers=later).status_code == 200
            assert again.get(ME, headers=user.auth).status_code == 401
            assert again.post(REFRESH, json={"refresh": user.refresh}).status_code == 401


def test_a_restored_copy_of_the_folder_has_the_copied_state():
    with Service(**THROTTLES_OFF) as service:
        with client(service) as http:
            user = make_user(http)
            post_prompt(http, user, "before the copy")
        assert service.stop() == 0
        copy = shutil.copytree(service.data_dir, service.folder / "copy")
        with Service(data_dir=service.data_dir, secret_key=service.secret_key, **THROTTLES_OFF) as again, client(again) as http:
            assert post_prompt(http, user, "after the copy").status_code == 201
            assert again.stop() == 0
        with Service(data_dir=copy, secret_key=service.secret_key, **THROTTLES_OFF) as restored, client(restored) as http:
            assert [item["prompt"] for item in list_prompts(http, user)] == ["before the copy"]
            assert http.post(LOGIN, json={"username": user.username, "password": PASSWORD}).status_code == 200
