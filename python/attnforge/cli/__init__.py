"""The command ``attnforge``; needs the extra ``cli`` (typer and rich)."""
