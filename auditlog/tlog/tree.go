// Package tlog is a gate's transparency log: a Merkle tree (RFC 6962) whose leaves say which session logs are in the store.
// Its objects are C2SP's (tlog-tiles, tlog-checkpoint, signed-note), but for one thing: a gate may only put, and no name is
// written twice. So there is no one checkpoint that is replaced, but a row of them, numbered, each with the leaves that
// came since the one before; and tiles are put when they are full.
//
// FORMAT.md, in the directory above, describes the bytes.
package tlog

import (
	"encoding/binary"
	"errors"
	"fmt"

	merkle "golang.org/x/mod/sumdb/tlog"
)

// Hash is a SHA-256 hash of the tree.
type Hash = merkle.Hash

const (
	tileHeight = 8 // C2SP tlog-tiles
	tileWidth  = 1 << tileHeight
	// MaxEntry is the most bytes that a leaf's entry may have.
	MaxEntry = 512
	// EntriesTileSize is the number of entries of a bundle, and of hashes in a tile.
	EntriesTileSize = tileWidth
)

// Object is what is to be stored.
type Object struct {
	Name  string `json:"name"`
	Bytes []byte `json:"bytes"`
}

// Tree is the right edge of a tree, all that is needed to go on with it. The zero value is the empty tree.
type Tree struct {
	Size    int64    `json:"size"`
	Edge    []Hash   `json:"edge"`    // by level; those whose bit in Size is set are the tree
	Tiles   [][]Hash `json:"tiles"`   // by a tile's level: the hashes of the one that is not full
	Entries [][]byte `json:"entries"` // of the bundle that is not full
}

// Append adds a leaf. It returns the tiles that are full now, under names that begin with prefix.
func (t *Tree) Append(prefix string, entry []byte) (full []Object) {
	h := merkle.RecordHash(entry)
	t.Entries = append(t.Entries, entry)
	n := t.Size
	t.Size++
	for level := 0; ; level++ {
		if level%tileHeight == 0 {
			full = t.tile(full, prefix, level/tileHeight, h)
		}
		if len(t.Edge) == level {
			t.Edge = append(t.Edge, Hash{})
		}
		if n>>level&1 == 0 {
			t.Edge[level] = h
			return full
		}
		h = merkle.NodeHash(t.Edge[level], h)
	}
}

// tile adds a hash to a tile's level, and the tile to full if that made it so; with those of level 0 come the entries.
func (t *Tree) tile(full []Object, prefix string, level int, h Hash) []Object {
	if len(t.Tiles) == level {
		t.Tiles = append(t.Tiles, nil)
	}
	t.Tiles[level] = append(t.Tiles[level], h)
	if len(t.Tiles[level]) < tileWidth {
		return full
	}
	n := t.Size>>(tileHeight*(level+1)) - 1
	if level == 0 {
		full = append(full, Object{Name: EntriesName(prefix, n), Bytes: appendBundle(nil, t.Entries)})
		t.Entries = nil
	}
	var b []byte
	for _, h := range t.Tiles[level] {
		b = append(b, h[:]...)
	}
	t.Tiles[level] = nil
	return append(full, Object{Name: TileName(prefix, level, n), Bytes: b})
}

// Root is the tree's hash (RFC 6962, section 2.1).
func (t *Tree) Root() Hash {
	if t.Size == 0 {
		h, _ := merkle.TreeHash(0, nil) // no hash is asked for
		return h
	}
	var root Hash
	first := true
	for level, h := range t.Edge {
		switch {
		case t.Size>>level&1 == 0:
		case first:
			root, first = h, false
		default:
			root = merkle.NodeHash(h, root)
		}
	}
	return root
}

// check says whether the state can be one that Append left.
func (t *Tree) check() error {
	if t.Size < 0 || len(t.Entries) != int(t.Size%tileWidth) {
		return errors.New("size and entries of the tree do not fit")
	}
	levels := 0
	for t.Size>>levels > 0 {
		levels++
	}
	if len(t.Edge) != levels || len(t.Tiles) != (levels+tileHeight-1)/tileHeight {
		return errors.New("size and hashes of the tree do not fit")
	}
	for level, tile := range t.Tiles {
		if len(tile) != int(t.Size>>(tileHeight*level)%tileWidth) {
			return errors.New("size and tiles of the tree do not fit")
		}
	}
	return nil
}

// Clone is a copy that shares nothing that Append changes.
func (t *Tree) Clone() *Tree {
	c := &Tree{Size: t.Size, Edge: append([]Hash(nil), t.Edge...), Entries: append([][]byte(nil), t.Entries...)}
	for _, tile := range t.Tiles {
		c.Tiles = append(c.Tiles, append([]Hash(nil), tile...))
	}
	return c
}

// appendBundle adds entries in the encoding of a C2SP entry bundle: each with its length in two bytes before it.
func appendBundle(b []byte, entries [][]byte) []byte {
	for _, e := range entries {
		b = binary.BigEndian.AppendUint16(b, uint16(len(e)))
		b = append(b, e...)
	}
	return b
}

// ParseBundle takes a full entry bundle apart.
func ParseBundle(b []byte) ([][]byte, error) {
	var entries [][]byte
	for len(b) > 0 {
		if len(b) < 2 {
			return nil, errors.New("entry bundle: cut off")
		}
		n := int(binary.BigEndian.Uint16(b))
		if n > MaxEntry || len(b) < 2+n {
			return nil, fmt.Errorf("entry bundle: an entry of %d bytes", n)
		}
		entries, b = append(entries, b[2:2+n:2+n]), b[2+n:]
		if len(entries) > tileWidth {
			return nil, errors.New("entry bundle: too many entries")
		}
	}
	if len(entries) != tileWidth {
		return nil, fmt.Errorf("entry bundle: %d entries, want %d", len(entries), tileWidth)
	}
	return entries, nil
}
