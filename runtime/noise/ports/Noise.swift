// The noise of a seed as docs/noise.md defines it, in Swift.

#if canImport(Darwin)
import Darwin
#elseif canImport(Glibc)
import Glibc
#elseif canImport(Android)
import Android
#endif

/// A sequence of random numbers, named by what it is for. Every method starts at its beginning.
public struct Noise {
    /// The purpose of the noise that becomes pictures.
    public static let pictureNoise: UInt32 = 0
    /// The purpose of the noise between passes, plus the number of the pass.
    public static let refiningNoise: UInt32 = 0x100

    public let seed: UInt64
    public let purpose: UInt32
    public let index: UInt64

    public init(seed: UInt64, purpose: UInt32 = Noise.pictureNoise, index: UInt64) {
        self.seed = seed
        self.purpose = purpose
        self.index = index
    }

    /// The first `n` words.
    public func words(_ n: Int) -> [UInt32] {
        Array((0..<UInt32((n + 3) / 4)).flatMap(block).prefix(n))
    }

    /// The first `n` unit normals.
    public func normals(_ n: Int) -> [Float] {
        var values: [Float] = []
        values.reserveCapacity(n + 1)
        for number in 0..<UInt32((n + 1) / 2) {
            let w = block(number)
            // 1 - unit lies in (0, 1], so that the logarithm is finite.
            let radius = (-2 * log(1 - unit(w[0], w[1]))).squareRoot()
            let angle = 2 * Double.pi * unit(w[2], w[3])
            values.append(Float(radius * cos(angle)))
            values.append(Float(radius * sin(angle)))
        }
        return Array(values.prefix(n))
    }

    private func block(_ number: UInt32) -> [UInt32] {
        var k = (UInt32(truncatingIfNeeded: seed), UInt32(truncatingIfNeeded: seed >> 32))
        var c = [number, purpose, UInt32(truncatingIfNeeded: index), UInt32(truncatingIfNeeded: index >> 32)]
        for _ in 0..<10 {
            let p = 0xD251_1F53 * UInt64(c[0])
            let q = 0xCD9E_8D57 * UInt64(c[2])
            c = [
                UInt32(q >> 32) ^ c[1] ^ k.0, UInt32(truncatingIfNeeded: q),
                UInt32(p >> 32) ^ c[3] ^ k.1, UInt32(truncatingIfNeeded: p),
            ]
            k = (k.0 &+ 0x9E37_79B9, k.1 &+ 0xBB67_AE85)
        }
        return c
    }

    /// The top 53 bits of a 64-bit word as a number in [0, 1).
    private func unit(_ low: UInt32, _ high: UInt32) -> Double {
        Double((UInt64(high) << 32 | UInt64(low)) >> 11) / 9_007_199_254_740_992
    }
}
