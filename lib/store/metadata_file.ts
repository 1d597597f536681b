import { join } from 'node:path';
import { BadMetadata, decode, encode, type Metadata } from './metadata.ts';
import { corrupt, type Disk } from './disk.ts';

const NAMES = ['metadata.0', 'metadata.1'] as const;
/** A million private ranges are 16 MB. What is larger than this nobody wrote. */
const LARGEST = 2 ** 30;

/**
 * The two copies of a memory's metadata. An update overwrites the older one, and syncs it before it is believed: whatever interrupts that, the
 * other one is whole.
 */
export class MetadataFile {
  readonly #disk: Disk;
  readonly #folder: string;
  #next: { readonly copy: 0 | 1; readonly sequence: bigint } = { copy: 0, sequence: 1n };

  constructor(disk: Disk, folder: string) {
    this.#disk = disk;
    this.#folder = folder;
  }

  /** @throws KvmError `ERR_CORRUPT` neither copy is whole */
  read(): Metadata {
    const reasons: string[] = [];
    let best: { readonly copy: 0 | 1; readonly sequence: bigint; readonly metadata: Metadata } | null = null;
    for (const copy of [0, 1] as const) {
      try {
        const bytes = this.#disk.read(join(this.#folder, NAMES[copy]), LARGEST);
        const found = { copy, ...decode(bytes) };
        if (!best || found.sequence > best.sequence) best = found;
      } catch (error) {
        if (!(error instanceof BadMetadata) && (error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
        reasons.push(`${NAMES[copy]}: ${(error as Error).message}`);
      }
    }
    if (!best) throw corrupt(`${this.#folder} has no metadata that can be read (${reasons.join('; ')})`);
    this.#next = { copy: best.copy ? 0 : 1, sequence: best.sequence + 1n };
    return best.metadata;
  }

  /** @throws KvmError of the system calls behind it; what was there before is still there. */
  write(metadata: Metadata): void {
    const { copy, sequence } = this.#next;
    this.#disk.write(join(this.#folder, NAMES[copy]), encode(metadata, sequence));
    this.#next = { copy: copy ? 0 : 1, sequence: sequence + 1n };
  }
}
