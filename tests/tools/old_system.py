#!/usr/bin/env python3
"""Creates a database of the Django system that this service replaces, with Django itself: tables,
hashes, rows.

    old_system.py DATABASE_URL USERS PROMPTS

The database must be empty. Every account's password is `password(n)`; the first HASHED_FULLY are
hashed with Django's number of iterations, and the others with a thousandth of it, because a
thousand full hashes would take minutes.
"""

import datetime
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import django
from django.conf import settings

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benches" / "load"))

import gen_prompts  # noqa: E402

HASHED_FULLY = 3
CHEAP_ITERATIONS = 1_000
START = datetime.datetime(2024, 2, 29, 12, 0, 0, 123456, tzinfo=datetime.timezone.utc)


def username(n):
    return f"old.user-{n}@example"


def password(n):
    return f"Altes Passwort {n}!"


def text(n):
    """The n-th prompt: usually an ordinary one, sometimes an odd one that the Django system
    accepted too."""
    odd = {3: "  white space around it \n", 5: "Ação, 日本語 e 🦀", 7: "line\nbreaks\r\nand\ttabs", 11: "x" * 20_000}
    return odd.get(n, gen_prompts.prompt(n))


def answer(n):
    return f"[mock] You said: {text(n)}" if n % 2 else f"Answer {n} of a model that was not written down."


def owner(n, users):
    return n % users + 1


def asked_at(n):
    return START + datetime.timedelta(seconds=n, microseconds=n)


def connect(url):
    """Points Django at the database. Once a process."""
    parts = urlsplit(url)
    settings.configure(
        DATABASES={"default": {
            "ENGINE": "django.db.backends.postgresql", "NAME": parts.path.lstrip("/"), "HOST": parts.hostname, "PORT": parts.port,
            "USER": unquote(parts.username), "PASSWORD": unquote(parts.password or ""),
        }},
        INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth"],
        USE_TZ=True, DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    )
    django.setup()


def make_tables():
    """Returns the model of prompts."""
    from django.contrib.auth.models import User
    from django.core.management import call_command
    from django.db import connection, models

    class Prompt(models.Model):
        user = models.ForeignKey(User, on_delete=models.CASCADE)
        prompt = models.TextField()
        response = models.TextField()
        created_at = models.DateTimeField(auto_now_add=True)

        class Meta:
            app_label = "prompts"

    call_command("migrate", verbosity=0)
    with connection.schema_editor() as editor:
        editor.create_model(Prompt)
    return Prompt


def make_users(count):
    from django.contrib.auth.hashers import PBKDF2PasswordHasher, make_password
    from django.contrib.auth.models import User

    hasher = PBKDF2PasswordHasher()

    def hashed(n):
        if n <= HASHED_FULLY:
            return make_password(password(n))
        return hasher.encode(password(n), hasher.salt(), CHEAP_ITERATIONS)

    User.objects.bulk_create(
        User(username=username(n), email=f"u{n}@example.com", password=hashed(n), date_joined=asked_at(n))
        for n in range(1, count + 1)
    )


def make_prompts(count, users):
    """With COPY, which takes a second where Django's models take a minute. Ids count from 1; after
    the last row, one more id is given out and not used."""
    from django.db import connection

    with connection.cursor() as cursor, cursor.copy("COPY prompts_prompt (user_id, prompt, response, created_at) FROM STDIN") as copy:
        for n in range(1, count + 1):
            copy.write_row((owner(n, users), text(n), answer(n), asked_at(n)))
    with connection.cursor() as cursor:
        cursor.execute("SELECT nextval(pg_get_serial_sequence('prompts_prompt', 'id'))")


def fill(url, users, prompts):
    connect(url)
    make_tables()
    make_users(users)
    make_prompts(prompts, users)


if __name__ == "__main__":
    fill(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
