import torch
from ray import serve
import river_ext
from ..serve import app as served_app
from ..serve.prepare import Served

def app(arguments: dict):
    def asgi():
        torch.set_num_threads(1)
        model = river_ext.load(None, "cpu")
        engine = model.engine(slots=8, max_len=512)
        return served_app.make_app(Served(model, engine, "lossless", 0.5), waiting=16, seconds=60)
    @serve.ingress(asgi)
    class Replica:
        async def check_health(self):
            pass
    return serve.deployment(Replica).options(num_replicas=2, max_ongoing_requests=16, ray_actor_options={"num_cpus": 1}).bind()
