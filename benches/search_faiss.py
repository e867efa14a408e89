"""Times FAISS IndexFlatIP, one query at a time on one thread.

    search_faiss.py FOLDER ROWS K

FOLDER holds rows.f32 and queries.f32: little-endian, [n][384]. Prints a line for each query: its
seconds, then the rows found.
"""

import sys
import time

import faiss
import numpy as np

DIMENSION = 384
# A query over a million rows takes about 60 ms: 200 queries are enough for the median.
MOST_ROWS_SCANNED = 200_000_000


def main():
    folder, rows, k = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    faiss.omp_set_num_threads(1)
    vectors = np.fromfile(f"{folder}/rows.f32", "<f4", rows * DIMENSION).reshape(-1, DIMENSION)
    queries = np.fromfile(f"{folder}/queries.f32", "<f4").reshape(-1, DIMENSION)
    index = faiss.IndexFlatIP(DIMENSION)
    index.add(vectors)
    del vectors
    queries = queries[: max(1, MOST_ROWS_SCANNED // rows)]
    for query in queries[: len(queries) // 10]:
        index.search(query[None], k)
    for query in queries:
        begun = time.perf_counter()
        _, found = index.search(query[None], k)
        seconds = time.perf_counter() - begun
        print(seconds, *found[0])


if __name__ == "__main__":
    main()
