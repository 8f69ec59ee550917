// The noise of a seed as docs/noise.md defines it, in Kotlin, for the JVM and for Android.

package dmd.noise

import kotlin.math.PI
import kotlin.math.cos
import kotlin.math.ln
import kotlin.math.sin
import kotlin.math.sqrt

/** A sequence of random numbers, named by what it is for. Every method starts at its beginning. */
class Stream(val seed: ULong, val purpose: UInt, val index: ULong) {
    /** The first [n] words, from 0 to 2^32 - 1. */
    fun words(n: Int): LongArray = LongArray(n).also { words ->
        for (i in 0 until n step 4) block(i / 4).copyInto(words, i, 0, minOf(4, n - i))
    }

    /** The first [n] unit normals. */
    fun normals(n: Int): FloatArray = FloatArray(n).also { values ->
        for (i in 0 until n step 2) {
            val (a, b, c, d) = block(i / 2)
            // 1 - unit lies in (0, 1], so that the logarithm is finite.
            val radius = sqrt(-2.0 * ln(1.0 - unit(a, b)))
            val angle = 2.0 * PI * unit(c, d)
            values[i] = (radius * cos(angle)).toFloat()
            if (i + 1 < n) values[i + 1] = (radius * sin(angle)).toFloat()
        }
    }

    /** Four words. The products are of 64 bits without a sign, which `ushr` keeps. */
    private fun block(number: Int): LongArray {
        var k0 = low(seed.toLong())
        var k1 = high(seed.toLong())
        val c = longArrayOf(number.toLong(), purpose.toLong(), low(index.toLong()), high(index.toLong()))
        repeat(10) {
            val p = 0xD2511F53L * c[0]
            val q = 0xCD9E8D57L * c[2]
            c[0] = high(q) xor c[1] xor k0
            c[1] = low(q)
            c[2] = high(p) xor c[3] xor k1
            c[3] = low(p)
            k0 = low(k0 + 0x9E3779B9L)
            k1 = low(k1 + 0xBB67AE85L)
        }
        return c
    }

    private fun low(value: Long): Long = value and 0xFFFFFFFFL

    private fun high(value: Long): Long = value ushr 32

    /** The top 53 bits of a 64-bit word as a number in [0, 1). */
    private fun unit(low: Long, high: Long): Double = ((high shl 32 or low) ushr 11) / 9007199254740992.0

    companion object {
        /** The purpose of the noise that becomes pictures. */
        const val PICTURE_NOISE = 0u

        /** The purpose of the noise between passes, plus the number of the pass. */
        const val REFINING_NOISE = 0x100u
    }
}
