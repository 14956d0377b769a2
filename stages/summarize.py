"""Stage `summarize`: a line for every session that came as messages, without a summary.

    python train.py --stage summarize data.users=imported.jsonl
"""

from files import write_json
from roles.players import Players
from run import Run


def stage_summarize(run: Run, players: Players, key: str) -> dict:
    """Write a summary of every session that came with messages alone."""
    # Real exports have messages; logs of the simulated platform have summaries.
    missing = [(user.user_id, i, session.messages) for user in run.logged_users
               for i, session in enumerate(user.sessions) if not session.summary]
    written = players.summarise([messages for *_, messages in missing])
    summaries: dict[str, dict[str, str]] = {}  # user -> number of a session -> its summary
    for (user_id, i, _), text in zip(missing, written, strict=True):
        if text:  # where there is none, the session is left out from here on
            summaries.setdefault(user_id, {})[str(i)] = text
    # Apart from the log, which stays as it was given.
    write_json(run.folder / "summarize" / "summaries.json", summaries)
    return {"without_summary": len(missing), "still": sum(not text for text in written)}
