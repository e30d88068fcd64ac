package docker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/image"
)

// imageFresh is how long an answer of the engine about an image is used again.
const imageFresh = 5 * time.Second

// imageCacheSize bounds the cache; profiles name few images.
const imageCacheSize = 64

// imageCache spares a login the engine's answer about an image that was asked for a moment ago.
type imageCache struct {
	mu      sync.Mutex // guards entries
	entries map[string]imageEntry
}

type imageEntry struct {
	image image.InspectResponse
	until time.Time
}

func (c *imageCache) get(reference string) (image.InspectResponse, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.entries[reference]
	return e.image, ok && time.Now().Before(e.until)
}

func (c *imageCache) put(reference string, img image.InspectResponse) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.entries) >= imageCacheSize || c.entries == nil {
		c.entries = make(map[string]imageEntry)
	}
	c.entries[reference] = imageEntry{img, time.Now().Add(imageFresh)}
}

func (c *imageCache) drop(reference string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.entries, reference)
}

// image finds the image of a reference, and pulls it as policy says.
func (b *Backend) image(ctx context.Context, reference, policy string) (image.InspectResponse, error) {
	if policy == "always" {
		if err := b.pull(ctx, reference); err != nil {
			return image.InspectResponse{}, err
		}
		b.images.drop(reference)
	}
	if img, ok := b.images.get(reference); ok {
		return img, nil
	}
	img, err := b.engine.ImageInspect(ctx, reference)
	if errdefs.IsNotFound(err) && (policy == "" || policy == "missing") {
		if err := b.pull(ctx, reference); err != nil {
			return image.InspectResponse{}, err
		}
		img, err = b.engine.ImageInspect(ctx, reference)
	}
	if err != nil {
		return image.InspectResponse{}, fmt.Errorf("find image: %w", err)
	}
	b.images.put(reference, img)
	return img, nil
}

func (b *Backend) pull(ctx context.Context, reference string) error {
	progress, err := b.engine.ImagePull(ctx, reference, image.PullOptions{})
	if err != nil {
		return fmt.Errorf("pull image: %w", err)
	}
	defer progress.Close()
	// A pull fails in the middle of an answer that began as a success.
	for d := json.NewDecoder(progress); ; {
		var line struct {
			Error string `json:"error"`
		}
		if err := d.Decode(&line); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("pull image: %w", err)
		}
		if line.Error != "" {
			return fmt.Errorf("pull image: %s", line.Error)
		}
	}
}

// digest names an image for the log: its digest in the repository of the reference, else any digest, else its ID.
func digest(reference string, img image.InspectResponse) string {
	repository, _, _ := strings.Cut(reference, "@")
	if i := strings.LastIndexByte(repository, ':'); i > strings.LastIndexByte(repository, '/') {
		repository = repository[:i]
	}
	for _, d := range img.RepoDigests {
		if strings.HasPrefix(d, repository+"@") {
			return d
		}
	}
	if len(img.RepoDigests) > 0 {
		return img.RepoDigests[0]
	}
	return img.ID
}
