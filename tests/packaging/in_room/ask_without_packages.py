"""A call of each command that needs an extra, which isn't there; prints what each one answers, a line each."""

from evaclip.commands.main import main

COMMANDS = (
    "train tiny", "report runs/x --text", "plan eva02-b-16", "eval zero-shot runs/x --data x.csv", "data check x.csv",
    "convert x.pt y.pt --to timm", "export tiny x.pt2 --tower image --random", "demo", "report runs/x",
)  # fmt: skip

for command in COMMANDS:
    print(command, main(command.split()), flush=True)
