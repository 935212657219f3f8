"""MLflow's store after its state folder moved: it holds the addresses of files with the whole path.

Invariant: only addresses below the folder that was left are rewritten, so doing it twice changes nothing more.
"""

from pathlib import Path

# Table -> column: where MLflow writes the address of a file.
ADDRESSES = {
    "experiments": "artifact_location",
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
    "model_versions": "storage_location",
}


def relocate(address: str, before: Path, after: Path) -> int:
    """Let a store name its files below `after` instead of `before`; return how many addresses were rewritten.

    address: of the store, for SQLAlchemy.
    """
    import sqlalchemy as sa

    if before == after:
        return 0
    old, new = f"{before.as_uri()}/", f"{after.as_uri()}/"
    engine = sa.create_engine(address)
    num_rewritten = 0
    try:
        with engine.begin() as connection:
            there = sa.inspect(connection).get_table_names()
            for table, name in ADDRESSES.items():
                if table not in there:
                    continue
                column = sa.column(name, sa.String)
                moved = sa.literal(new).concat(sa.func.substr(column, len(old) + 1))
                change = sa.update(sa.table(table, column)).values({name: moved})
                done = connection.execute(change.where(column.startswith(old, autoescape=True)))
                num_rewritten += done.rowcount
    finally:
        engine.dispose()
    return num_rewritten
