"""Ask the service a question, and exit with 0 when it answers: the pod of `helm test`."""

import json
import sys
import urllib.request
from pathlib import Path

url, timeout = sys.argv[1], float(sys.argv[2])
body = {
    "prompt": "<|user|>\nHow to explain Internet for a medieval knight?<|end|>\n<|assistant|>\n",
    "return_full_text": False,
    "generate_kwargs": {"max_new_tokens": 16, "max_length": None, "do_sample": False},
}
headers = {"Content-Type": "application/json"}
for file in sys.argv[3:]:  # of API keys, with the name of each before it or without
    headers["X-API-Key"] = Path(file).read_text(encoding="ascii").strip().splitlines()[0].split()[-1]
request = urllib.request.Request(url + "/chat", json.dumps(body).encode(), headers)
# A cluster's Service is never behind a proxy.
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
with opener.open(request, timeout=timeout) as response:
    answer = json.load(response)["Result"]
print(answer)
sys.exit(not answer.strip())
