"""Ask the service a question, and exit with 0 when it answers: the pod of `helm test`."""

import json
import os
import sys
import urllib.request

url, timeout = sys.argv[1], float(sys.argv[2])
body = {
    "prompt": "<|user|>\nHow to explain Internet for a medieval knight?<|end|>\n<|assistant|>\n",
    "return_full_text": False,
    "generate_kwargs": {"max_new_tokens": 16, "max_length": None, "do_sample": False},
}
headers = {"Content-Type": "application/json"}
if keys := os.environ.get("API_KEYS", "").split():
    headers["X-API-Key"] = keys[0]
request = urllib.request.Request(url + "/chat", json.dumps(body).encode(), headers)
# A cluster's Service is never behind a proxy.
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
with opener.open(request, timeout=timeout) as response:
    answer = json.load(response)["Result"]
print(answer)
sys.exit(not answer.strip())
