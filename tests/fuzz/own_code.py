"""Networks and functions from outside the package that cannot be used."""

import random

HEAD = "import torch\nfrom torch import nn\n"
FLAT = "nn.Sequential(nn.Flatten(), nn.Linear(64, k))"
NET = f"""class Net(nn.Module):
    def __init__(self, k):
        super().__init__()
        self.net = {FLAT}
    def forward(self, x):
"""
# Bodies of the module net.py, whose factory is make(k, shape): classes, (C, H, W).
NETWORKS = {
    "syntax": "def make(k, shape:\n",
    "tabs": "def make(k, shape):\n\tif k:\n        return 1\n",
    "nul": "x = '\0'\n",
    "latin-1": b"# \xe9\n",
    "binary": bytes(range(256)),
    "empty": "",
    "missing import": "import no_such_package\n",
    "import error": "raise ImportError('no \x1b[31m\\n way')\n",
    "exit": "import sys\nsys.exit(0)\n",
    "deep": "x = " + "(" * 500 + ")" * 500 + "\n",
    "no function": "make = 7\n",
    "arguments": f"def make():\n    return {FLAT}\n",
    "raises": "def make(k, shape):\n    raise ValueError('x' * 100_000)\n",
    "exits": "def make(k, shape):\n    raise SystemExit\n",
    "recursion": "def make(k, shape):\n    return make(k, shape)\n",
    "nothing": "def make(k, shape):\n    pass\n",
    "class": "def make(k, shape):\n    return nn.Linear\n",
    "no weights": "def make(k, shape):\n    return nn.Flatten()\n",
    "classes": "def make(k, shape):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, k + 1))\n",
    "size": "def make(k, shape):\n    return nn.Sequential(nn.Flatten(), nn.Linear(65, k))\n",
    "huge": "def make(k, shape):\n    return nn.Linear(10**9, 10**9)\n",
    "negative": "def make(k, shape):\n    return nn.Linear(-1, k)\n",
    "meta": "def make(k, shape):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, k, device='meta'))\n",
    "nan": "def make(k, shape):\n    net = nn.Linear(64, k)\n    net.weight.data *= torch.nan\n"
    "    return nn.Sequential(nn.Flatten(), net)\n",
    "tuple": f"{NET}        return self.net(x), x\ndef make(k, shape):\n    return Net(k)\n",
    "forward": f"{NET}        raise KeyError('\\n')\ndef make(k, shape):\n    return Net(k)\n",
}
FUNCTIONS = {
    "attack.kind": [
        "def f(images, labels): return images",
        "def f(logits_fn, images, labels, attack, generator): return [images]",
        "def f(logits_fn, images, labels, attack, generator): return images[:1]",
        "def f(logits_fn, images, labels, attack, generator): return images / 0",
        "def f(logits_fn, images, labels, attack, generator): return images @ labels",
        "def f(logits_fn, images, labels, attack, generator): raise StopIteration('\\x1b[2J')",
    ],
    "loss.extra": [
        "def f(adversarial, clean, labels): return adversarial.logits.mean()",
        "def f(adversarial, clean, labels): return adversarial.logits.detach().sum(1)",
        "def f(adversarial, clean, labels): return adversarial.logits.sum(1) * float('nan')",
        "def f(adversarial, clean, labels): return 'x'",
    ],
    "mining.miner": [
        "def f(anchors, anchor_labels, pool, pool_labels, generator): return anchor_labels",
        "def f(anchors, anchor_labels, pool, pool_labels, generator): return anchor_labels * 1.0, anchor_labels > -1",
        "def f(anchors, anchor_labels, pool, pool_labels, generator): return anchor_labels + 8, anchor_labels > -1",
    ],
}


def own_code(rng: random.Random) -> tuple[list[str], dict[str, str | bytes]]:
    """Arguments and files of a run with code that must be refused."""
    files: dict[str, str | bytes] = {}
    if rng.random() < 0.2:
        field = rng.choice([*FUNCTIONS])
        files["code/net.py"] = f"{HEAD}{rng.choice(FUNCTIONS[field])}\n"
        value = '{"net:f": 1}' if field == "loss.extra" else "net:f"
        extra = ["--mining.pool=separate", "--mining.pool_size=50"] if field == "mining.miner" else []
        return [f"--{field}", value, "--model.code=code", *extra], files
    kind = rng.choice([*NETWORKS, "name", "folder", "hides", "pickle", "link", "requirements", "large"])
    body = NETWORKS.get(kind, f"def make(k, shape):\n    return {FLAT}\n")
    files["code/net.py"] = body if isinstance(body, bytes) else HEAD + body
    name, folder = "net:make", "code"
    if kind == "name":
        name = rng.choice(["net:mak", "nets:make", "os:system", "net:__class__", "torch.nn:Linear", "net.x:make"])
    elif kind == "folder":
        folder = rng.choice(["no/such", "code/net.py", "x" * 5000, "\n", "~nobody", "/dev/null"])
    extra = {"hides": "code/torch.py", "pickle": "code/w.pt", "requirements": "code/requirements.txt"}
    if kind in extra:
        files[extra[kind]] = "--index-url x\n../y\n"
    elif kind == "link":
        files["code/link"] = "->/etc/passwd"
    elif kind == "large":
        files["code/data.bin"] = bytes(51_000_000)
    return [f"--model.name={name}", f"--model.code={folder}"], files
