// Numbers in order of use: those that are made by default come of hashes of absolute paths, and what
// is built would depend on where.
module.exports = { optimization: { moduleIds: 'natural', chunkIds: 'natural' } };
