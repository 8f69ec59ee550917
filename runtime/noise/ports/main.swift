// Answers a line `seed purpose index n` by two: n words, and the bits of n normals.

while let line = readLine() {
    let fields = line.split(separator: " ").compactMap { UInt64($0) }
    let noise = Noise(seed: fields[0], purpose: UInt32(fields[1]), index: fields[2])
    let n = Int(fields[3])
    print(noise.words(n).map(String.init).joined(separator: " "))
    print(noise.normals(n).map { String($0.bitPattern) }.joined(separator: " "))
}
