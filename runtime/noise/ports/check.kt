// Answers a line `seed purpose index n` by two: n words, and the bits of n normals.

import dmd.noise.Stream

fun main() {
    for (line in generateSequence(::readlnOrNull)) {
        val (seed, purpose, index, n) = line.split(" ")
        val stream = Stream(seed.toULong(), purpose.toUInt(), index.toULong())
        println(stream.words(n.toInt()).joinToString(" "))
        println(stream.normals(n.toInt()).joinToString(" ") { it.toRawBits().toUInt().toString() })
    }
}
