"""Calls of /v1 over three replicas: as on one server, each is kept, found and metered.

V1_CALLS sets how many mixed calls there are (330; `make soak` says 10000).
"""

from mixed_calls import mixed, upstreams
from openai_upstream import Upstream
from replicas import Cluster
from servers import Postgres, Redis
from test_v1_parity import CALLS, SETTINGS, check_parity


def test_mixed_calls_over_three_replicas_are_kept_as_one_row_each():
    calls = mixed(CALLS)
    with Upstream() as upstream, Postgres() as postgres, Redis() as redis, Cluster(3, postgres, redis, **SETTINGS, UPSTREAMS=upstreams(upstream.url)) as cluster:
        urls = [replica.url for replica in cluster.replicas]
        check_parity(cluster, urls, calls, upstream)
    print(f"{len(calls)} mixed calls over three replicas: {len(calls)} rows")
