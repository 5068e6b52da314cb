"""Hierarchical navigable small world graphs: approximate nearest neighbours in about log(n) steps, in numpy.

A small, correct implementation to read beside the paper: Yu. Malkov and D. Yashunin, "Efficient and robust approximate
nearest neighbor search using Hierarchical Navigable Small World graphs", arXiv 1603.09320; "Algorithm 1" and so on in
the comments are the paper's. Each element is a node of a graph whose edges lead to near elements, so that a search may
walk from node to node, always nearer to the query. Layer 0 has every element; each layer above has about one in `max_m`
of the one below, hence longer edges: a search crosses the space on top and looks closely at the bottom, as a skip list
does.

    index = HNSW(dim=64)
    index.add(vectors)                                       # [num_vectors, dim]
    ids, distances = index.search(query, k=10, ef_search=100)

Numpy's share of the work is the distances: all neighbours of a node at once. One index serves one thread.
"""

from __future__ import annotations

import heapq
import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]
# (squared distance to the query, id): tuples, because heapq orders them by distance and then by id.
Neighbour = tuple[float, int]


class HNSW:
    """An index over vectors of `dim` float32 values under squared Euclidean distance; ids are 0, 1, 2 … as added.

    dim: length of a vector.
    max_m: the most edges that an element keeps on a layer above 0 (the paper's M_max). More edges: higher recall, more
        memory, more distances a step.
    ef_construction: candidates that an insertion looks for before it chooses its edges. It costs build time only.
    max_m0: the most edges that an element keeps on layer 0, where all elements are; 2 · max_m by default.
    m: edges that a new element makes on each of its layers (the paper's M); by default as many as it may keep there.
        hnswlib has m=max_m: on layer 0, the other half is left to elements that come later.
    keep_pruned: fill edges that the heuristic leaves free with the nearest candidates it discarded (Algorithm 4's
        keepPrunedConnections). hnswlib does without.
    seed: of the levels; the same vectors in the same order with the same seed give the same graph.

    Raises ValueError for a value out of range.
    """

    def __init__(
        self,
        dim: int,
        *,
        max_m: int = 16,
        ef_construction: int = 200,
        max_m0: int | None = None,
        m: int | None = None,
        keep_pruned: bool = True,
        seed: int = 0,
    ) -> None:
        max_m0 = 2 * max_m if max_m0 is None else max_m0
        m = max_m0 if m is None else m
        # With one edge an element the levels' scale, 1 / ln(max_m), is infinite.
        for name, value, least in (("dim", dim, 1), ("max_m", max_m, 2), ("ef_construction", ef_construction, 1)):
            if value < least:
                raise ValueError(f"{name}={value}: must be at least {least}")
        if max_m0 < max_m:
            raise ValueError(f"max_m0={max_m0}: must be at least max_m={max_m}, since layer 0 has the most elements")
        if not 1 <= m <= max_m0:
            raise ValueError(f"m={m}: must be from 1 to max_m0={max_m0}, the most edges that an element keeps")
        self.dim = dim
        self.max_m = max_m
        self.max_m0 = max_m0
        self.m = m
        self.ef_construction = ef_construction
        self.keep_pruned = keep_pruned
        # mL of the paper: layers then overlap least, each having one in max_m elements of the layer below.
        self.level_scale = 1 / math.log(max_m)
        # The cost of the algorithm so far, in any language: distances computed, and nodes whose edges led to elements
        # that the walk had not seen.
        self.num_distances = 0
        self.num_steps = 0
        # layers[l][id]: ids of the neighbours of an element on layer l. Its keys are the elements of the layer.
        self.layers: list[dict[int, IntArray]] = []
        # A copy of a vector has no node but joins the first one's: copies would spend all edges on each other.
        self._node_of: dict[bytes, int] = {}
        self._copies: dict[int, list[int]] = {}
        self._entry_point = 0  # an element of the top layer
        self._num_vectors = 0
        self._storage: FloatArray = np.empty((0, dim), np.float32)  # [capacity, dim]
        self._visited: IntArray = np.empty(0, np.int32)  # [capacity]: the number of the search that last saw an element
        self._search_number = 0
        self._random = np.random.default_rng(seed)

    def __len__(self) -> int:
        return self._num_vectors

    @property
    def vectors(self) -> FloatArray:
        """The added vectors by id, [num_vectors, dim] float32. A view: do not write to it."""
        return self._storage[: self._num_vectors]

    def add(self, vectors: ArrayLike) -> None:
        """Inserts vectors, [num_vectors, dim] or one as [dim]. Raises ValueError on another shape, NaN or infinity, and
        then adds none of them."""
        new = self._checked(vectors, "vectors")
        self._reserve(self._num_vectors + len(new))
        for vector in new:
            self._insert(vector)

    def search(self, query: ArrayLike, k: int = 10, ef_search: int = 50) -> tuple[IntArray, FloatArray]:
        """Returns the `k` nearest elements that a walk with `ef_search` candidates finds (Algorithm 5).

        query: [dim]. ef_search: at least k is used, since k results need k candidates; larger is slower and finds more.
        Returns ids and squared distances, nearest first, both [k], or shorter where the index has fewer elements or,
        with very small max_m, the graph has parts that the walk does not reach.
        """
        if k < 1 or ef_search < 1:
            raise ValueError(f"k={k}, ef_search={ef_search}: both must be at least 1")
        target = self._checked(query, "query")
        if len(target) != 1:
            raise ValueError(f"query has {len(target)} rows: search takes one query, of shape [{self.dim}]")
        if not len(self):
            return np.empty(0, np.int32), np.empty(0, np.float32)
        nearest = [self.entry(target[0])]
        for layer in range(len(self.layers) - 1, 0, -1):
            nearest = self.search_layer(target[0], nearest, ef=1, layer=layer)
        nearest = self.search_layer(target[0], nearest, ef=max(ef_search, k), layer=0)
        found = [(d, i) for d, node in nearest for i in (node, *self._copies.get(node, ()))][:k]
        return np.array([i for _, i in found], np.int32), np.array([d for d, _ in found], np.float32)

    def search_layer(self, query: FloatArray, entries: list[Neighbour], ef: int, layer: int) -> list[Neighbour]:
        """Returns the `ef` nearest elements of a layer that a walk from `entries` finds, nearest first (Algorithm 2).

        The nearest candidate not yet looked at gives its neighbours; the walk ends when that candidate is farther than
        the farthest of the `ef` best so far. With ef=1 this is greedy descent: go to the nearest neighbour, or stop.
        """
        self._search_number += 1
        visited, now = self._visited, self._search_number
        visited[[i for _, i in entries]] = now
        edges = self.layers[layer]
        candidates = list(entries)  # a heap with the nearest on top
        heapq.heapify(candidates)
        best = [(-d, i) for d, i in entries]  # a heap with the farthest on top: heapq has the least there
        heapq.heapify(best)
        while candidates:
            distance, node = heapq.heappop(candidates)
            if distance > -best[0][0]:
                break
            neighbours = edges[node]
            unseen = neighbours[visited[neighbours] != now]
            if not len(unseen):
                continue
            self.num_steps += 1
            visited[unseen] = now
            for distance, i in zip(self.distances(query, unseen).tolist(), unseen.tolist(), strict=True):
                if len(best) < ef:
                    heapq.heappush(best, (-distance, i))
                elif distance < -best[0][0]:
                    heapq.heappushpop(best, (-distance, i))
                else:
                    continue
                heapq.heappush(candidates, (distance, i))
        return sorted((-d, i) for d, i in best)

    def entry(self, query: FloatArray) -> Neighbour:
        """Returns where a search begins: an element of the top layer. The index must not be empty."""
        point = self._entry_point
        return float(self.distances(query, np.array([point], np.int32))[0]), point

    def distances(self, query: FloatArray, ids: IntArray) -> FloatArray:
        """Returns the squared distances of elements to a query, [num_ids]. Computed from differences, since
        |x|² − 2 x·q + |q|² loses in float32 exactly what distinguishes near elements."""
        self.num_distances += len(ids)
        offsets = self._storage[ids] - query  # [num_ids, dim]
        squared: FloatArray = np.einsum("nd,nd->n", offsets, offsets)
        return squared

    def check_integrity(self) -> None:
        """Asserts the invariants of the graph, for tests and for changes to the code above."""
        for number, edges in enumerate(self.layers):
            for i, neighbours in edges.items():
                assert len(neighbours) <= self._limit(number), (
                    f"element {i} has {len(neighbours)} edges on layer {number}"
                )
                assert len(set(neighbours.tolist())) == len(neighbours), f"element {i} has an edge twice"
                assert i not in neighbours, f"element {i} is its own neighbour"
                assert all(j in edges for j in neighbours.tolist()), f"an edge of {i} leaves layer {number}"
            if number:
                assert edges.keys() <= self.layers[number - 1].keys(), f"layer {number} has what is not below it"
        if self.layers:
            assert self._entry_point in self.layers[-1]
            assert len(self.layers[0]) + sum(map(len, self._copies.values())) == len(self)

    # Insertion.

    def _insert(self, vector: FloatArray) -> None:
        """Inserts one vector (Algorithm 1)."""
        new = self._num_vectors
        self._storage[new] = vector
        self._num_vectors += 1
        node = self._node_of.setdefault(vector.tobytes(), new)
        if node != new:
            self._copies.setdefault(node, []).append(new)
            return
        level = self._draw_level()
        top = len(self.layers) - 1
        nearest = [self.entry(vector)] if new else []
        for layer in range(top, level, -1):
            nearest = self.search_layer(vector, nearest, ef=1, layer=layer)
        for layer in range(min(top, level), -1, -1):
            nearest = self.search_layer(vector, nearest, ef=self.ef_construction, layer=layer)
            ids = np.array([i for _, i in nearest], np.int32)
            chosen = self._select(vector, ids, min(self.m, self._limit(layer)))
            self.layers[layer][new] = chosen
            for neighbour in chosen.tolist():
                self._link(neighbour, new, layer)
        if level > top:
            self.layers.extend({new: np.empty(0, np.int32)} for _ in range(level - top))
            self._entry_point = new

    def _limit(self, layer: int) -> int:
        return self.max_m if layer else self.max_m0

    def _draw_level(self) -> int:
        """Returns the topmost layer of a new element: floor(−ln U · mL), U uniform on (0, 1]."""
        return int(-math.log(1.0 - self._random.random()) * self.level_scale)

    def _link(self, source: int, target: int, layer: int) -> None:
        """Adds an edge; if that is one too many, chooses again among all of them."""
        edges = self.layers[layer]
        neighbours = np.append(edges[source], np.int32(target))
        if len(neighbours) > self._limit(layer):
            origin = self._storage[source]
            nearest_first = np.argsort(self.distances(origin, neighbours), kind="stable")
            neighbours = self._select(origin, neighbours[nearest_first], self._limit(layer))
        edges[source] = neighbours

    def _select(self, origin: FloatArray, ids: IntArray, limit: int) -> IntArray:
        """Returns at most `limit` of `ids`, nearest first, that lie in different directions (Algorithm 4).

        An id is chosen if it is nearer to `origin` than to all those chosen before. Edges to a whole cluster would be
        redundant and leave no way to the next one.
        """
        # With a, b the offsets of two candidates from the origin, |b − a|² ≤ |b|² exactly if 2 a·b ≥ |a|²: b is beyond
        # the plane half way to a. All pairs are one matrix product.
        offsets = self._storage[ids] - origin  # [num_candidates, dim]
        products = offsets @ offsets.T
        self.num_distances += len(ids) * (len(ids) - 1) // 2
        beyond = 2 * products >= products.diagonal()[:, None]
        chosen = np.zeros(len(ids), bool)
        discarded = np.zeros(len(ids), bool)
        free = limit
        for position in range(len(ids)):
            if not discarded[position]:
                chosen[position] = True
                discarded |= beyond[position]
                free -= 1
                if not free:
                    break
        if self.keep_pruned and free:
            chosen[np.flatnonzero(~chosen)[:free]] = True
        return ids[chosen]

    # Vectors.

    def _checked(self, values: ArrayLike, name: str) -> FloatArray:
        array = np.asarray(values, np.float32)
        rows = array[None] if array.ndim == 1 else array
        if rows.ndim != 2 or (rows.shape[1] != self.dim):
            raise ValueError(
                f"{name} of shape {list(array.shape)}: must be [n, {self.dim}] or [{self.dim}], as dim says"
            )
        if not np.isfinite(rows).all():
            raise ValueError(f"{name}: must be finite in float32, and some value is NaN or infinite")
        return rows + np.float32(0)  # −0 becomes 0, so that equal vectors have equal bytes

    def _reserve(self, needed: int) -> None:
        capacity = len(self._storage)
        if needed > capacity:
            capacity = max(needed, 2 * capacity)  # doubled, so that adding one by one copies each vector about once
            self._storage = np.concatenate([self.vectors, np.empty((capacity - len(self), self.dim), np.float32)])
            self._visited = np.zeros(capacity, np.int32)
            self._search_number = 0
