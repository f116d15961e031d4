"""File names of a run: the trainer writes them, evaluation and report read them.

RUN/config.yaml  log.jsonl  events.jsonl  tensorboard/  wandb/  checkpoints/latest  checkpoints/step_00000100/
RUN/flight-recorder/rank_0 (last NCCL collectives of each rank, after a timeout)
RUN/lock (while a process trains)  evaluations/  galleries/ (what `evaclip eval` measured)  report.html
step_.../model.safetensors  ema.safetensors  optimizer/  model.json  preprocess.json  classes.json  state.pt  meta.json
step_.../random/ (states of the random generators, a file per rank)
step_.../hf_text/ (config.json and tokenizer of a text tower of transformers)
step_.../model.safetensors.parts/  ema.safetensors.parts/ (of a sharded run, until they are joined in their place)
"""

CONFIG_FILE = "config.yaml"
LOG_FILE = "log.jsonl"
EVENTS_FILE = "events.jsonl"
LOCK_FILE = "lock"
TENSORBOARD_FOLDER = "tensorboard"
WANDB_FOLDER = "wandb"
CHECKPOINTS_FOLDER = "checkpoints"
EVALUATIONS_FOLDER = "evaluations"
GALLERIES_FOLDER = "galleries"
FLIGHT_RECORDER_FOLDER = "flight-recorder"
REPORT_FILE = "report.html"
LATEST_FILE = "latest"

MODEL_FILE = "model.safetensors"
EMA_FILE = "ema.safetensors"
SHARDS_SUFFIX = ".parts"
"""Suffix of the folder with the shards of a file."""
OPTIMIZER_FOLDER = "optimizer"
MODEL_CONFIG_FILE = "model.json"
PREPROCESS_FILE = "preprocess.json"
HF_TEXT_FOLDER = "hf_text"
CLASSES_FILE = "classes.json"
"""The names of a classifier's classes, by label, if they have any."""
STATE_FILE = "state.pt"
RANDOM_FOLDER = "random"
META_FILE = "meta.json"

STOPPED = "stopped by a signal"
"""How the message begins that a run leaves when it is stopped before its end."""
