// The little of an ELF file that says where an addon can be loaded: its machine, and the symbol versions it asks for.

import { closeSync, openSync, readFileSync, readSync } from 'node:fs';

/** e_machine by Node's name of the architecture. */
export const machines = { x64: 0x3e, arm64: 0xb7 };

/** e_machine; undefined if the file is not a 64-bit little-endian ELF. */
export function machineOf(file) {
  const header = Buffer.alloc(20);
  const fd = openSync(file, 'r');
  readSync(fd, header, 0, header.length, 0);
  closeSync(fd);
  const elf64 = header.readUInt32BE(0) === 0x7f454c46 && header[4] === 2 && header[5] === 1;
  return elf64 ? header.readUInt16LE(18) : undefined;
}

/** Every version in .gnu.version_r: 'GLIBC_2.17', 'GLIBCXX_3.4.21'… */
export function versionsNeeded(file) {
  const elf = readFileSync(file);
  const word = (offset) => Number(elf.readBigUInt64LE(offset));
  const [table, size, count] = [word(0x28), elf.readUInt16LE(0x3a), elf.readUInt16LE(0x3c)];
  const section = (index) => {
    const header = table + index * size;
    return {
      type: elf.readUInt32LE(header + 4),
      offset: word(header + 0x18),
      link: elf.readUInt32LE(header + 0x28),
      info: elf.readUInt32LE(header + 0x2c),
    };
  };
  const versions = new Set();
  for (const needs of Array.from({ length: count }, (_, index) => section(index))) {
    if (needs.type !== 0x6ffffffe) continue; // SHT_GNU_verneed: libraries, each with a list of versions
    const strings = section(needs.link).offset;
    let library = needs.offset;
    for (let left = needs.info; left > 0; left--) {
      let version = library + elf.readUInt32LE(library + 8);
      for (let entries = elf.readUInt16LE(library + 2); entries > 0; entries--) {
        const name = strings + elf.readUInt32LE(version + 8);
        versions.add(elf.toString('latin1', name, elf.indexOf(0, name)));
        version += elf.readUInt32LE(version + 12);
      }
      library += elf.readUInt32LE(library + 12);
    }
  }
  return [...versions].sort();
}
