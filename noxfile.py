"""The engine's fast tests with each Python and PyTorch: ``nox``. tools/measure/compatibility.py keeps what they came to."""

import nox

nox.options.default_venv_backend = "venv"
# the oldest and the newest of both, and what lies between
VERSIONS = [("3.10", "2.6.0"), ("3.11", "2.13.0"), ("3.12", "2.8.0"), ("3.13", "2.15.0")]


@nox.session
@nox.parametrize("python,torch", VERSIONS)
def engine(session: nox.Session, torch: str) -> None:
    """Further arguments go to pytest."""
    pin = session.create_tmp() + "/constraints.txt"
    with open(pin, "w", encoding="utf-8") as file:
        file.write(f"torch=={torch}\n")
    session.install(f"torch=={torch}")
    session.install("-c", pin, "-e", ".[cli,test]")
    report = f"--junitxml=out/compatibility/engine-{session.python}-{torch}.xml"
    session.run("python", "-m", "pytest", "tests/engine", "tests/test_security.py", "-m", "not slow", report, *session.posargs)
