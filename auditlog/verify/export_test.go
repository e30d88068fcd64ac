package verify

// SetMaxEntries sets the bound of the entries that are kept until the function that it returns is called.
func SetMaxEntries(n int64) (undo func()) {
	was := maxEntries
	maxEntries = n
	return func() { maxEntries = was }
}
